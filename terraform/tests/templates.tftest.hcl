mock_provider "aws" {
  source = "./tests/mocks"
}

variables {
  environment        = "dev"
  account_id         = "123456789012"
  region             = "eu-central-1"
  availability_zones = ["eu-central-1a", "eu-central-1b"]
  cluster_admins     = { platform = "arn:aws:iam::123456789012:role/platform" }
  node_groups        = { general = { instance_types = ["m7i.large"], least = 2, most = 4 } }
  monthly_usd        = 800
  emails             = ["team@example.org"]
}

run "prod_is_protected" {
  command = plan

  module {
    source = "./templates/project_cv_factory"
  }

  variables {
    name         = "a-name-that-is-too-long"
    environment  = "prod"
    region       = "Frankfurt"
    is_protected = false
    projects     = ["chest-xray"]

    service_accounts = { trainer = ["cv-factory:trainer"] }
  }

  expect_failures = [var.name, var.region, var.is_protected, var.projects, var.service_accounts]
}

run "an_account_is_twelve_digits" {
  command = plan

  module {
    source = "./templates/project_cv_factory"
  }

  variables {
    account_id  = "1234"
    environment = "test"
    projects    = ["chest_xray"]
  }

  expect_failures = [var.account_id, var.environment]
}

run "nlp_factory" {
  command = apply

  module {
    source = "./templates/project_nlp_factory"
  }

  variables {
    projects = ["report_triage"]
  }

  assert {
    condition     = keys(output.role_arns) == ["cluster-autoscaler", "gateway", "mlflow", "rollout", "stages"] && keys(output.execution_role_arns) == ["report_triage"]
    error_message = "A component has no role."
  }
}

run "genai_platform" {
  command = apply

  module {
    source = "./templates/project_genai_platform"
  }

  assert {
    condition     = keys(output.role_arns) == ["cluster-autoscaler", "indexer", "llm", "retriever"] && output.vectors.name == "vectors"
    error_message = "A component has no role, or vectors have no database."
  }
}

run "remote_state" {
  command = apply

  module {
    source = "./templates/remote_state"
  }

  assert {
    condition     = output.backend.kms_key_id == "alias/cv-factory-state" && output.backend.region == "eu-central-1"
    error_message = "The backend files of the templates name another key."
  }
}

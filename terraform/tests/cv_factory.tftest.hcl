mock_provider "aws" {
  source = "./tests/mocks"

  override_resource {
    target = module.storage.aws_s3_bucket.this
    values = { arn = "arn:aws:s3:::storage", id = "storage" }
  }

  override_resource {
    target = module.endpoint["chest_xray"].aws_iam_role.this
    values = { arn = "arn:aws:iam::123456789012:role/cv-factory-dev-chest-xray" }
  }

  override_resource {
    target = module.iam.aws_iam_role.this["rollout"]
    values = { arn = "arn:aws:iam::123456789012:role/cv-factory-dev-rollout" }
  }
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

# tests/test_terraform.py reads the policies of this run and holds the code's AWS calls against them.
run "cv_factory" {
  command = apply

  module {
    source = "./templates/project_cv_factory"
  }

  variables {
    projects     = ["chest_xray", "pneumonia"]
    data_sources = { places = ["arn:aws:s3:::hospital/chest"] }
    ci = {
      issuer_arn = "arn:aws:iam::123456789012:oidc-provider/ci.example"
      issuer_url = "https://ci.example"
      subjects   = ["repo:owner/name:environment:dev"]
    }
  }

  assert {
    condition     = output.storage == "s3://storage/cv-factory" && keys(output.deploy) == ["chest_xray", "pneumonia"]
    error_message = "Projects are told another storage, or one of them has no endpoint."
  }

  assert {
    condition     = alltrue([for deploy in output.deploy : deploy.tags["stack"] == "cv-factory-dev"])
    error_message = "The budget, which counts by the tag, does not see the endpoints."
  }

  assert {
    condition     = output.registry == "123456789012.dkr.ecr.eu-central-1.amazonaws.com/cv-factory-dev/"
    error_message = "Images are pushed to another place."
  }
}

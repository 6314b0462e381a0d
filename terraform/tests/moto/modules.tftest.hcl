# The modules against moto's server, whose address is in AWS_ENDPOINT_URL: made, read back and destroyed by the real provider.
# Not here, because moto cannot: rds_postgres (and so mlflow_stack; the provider does not find an instance again), the budget (moto
# does not list who is told), EKS's add-ons. Lifecycle rules are left out for their minute of waiting.

provider "aws" {
  region = "eu-central-1"
}

variables {
  name = "cv-factory-moto"
}

run "key" {
  module {
    source = "./modules/kms_key"
  }

  variables {
    description = "Studies"
  }
}

run "logs" {
  state_key = "logs" # else both buckets would be one: a state is a module's

  module {
    source = "./modules/s3_bucket"
  }

  override_resource {
    target = aws_s3_bucket_lifecycle_configuration.this
  }

  variables {
    name              = "cv-factory-moto-logs"
    takes_access_logs = true
    force_destroy     = true # moto does write access logs
  }
}

run "storage" {
  module {
    source = "./modules/s3_bucket"
  }

  override_resource {
    target = aws_s3_bucket_lifecycle_configuration.this
  }

  variables {
    name        = "cv-factory-moto-storage"
    kms_key_arn = run.key.arn
    log_bucket  = run.logs.name
  }

  assert {
    condition     = output.arn == "arn:aws:s3:::cv-factory-moto-storage"
    error_message = "The bucket has another ARN than the roles are told."
  }
}

run "images" {
  module {
    source = "./modules/ecr"
  }

  variables {
    repositories = ["inference", "trainer"]
    kms_key_arn  = run.key.arn
  }

  assert {
    condition     = endswith(output.urls["trainer"], ".dkr.ecr.eu-central-1.amazonaws.com/cv-factory-moto/trainer")
    error_message = "Images are pushed to another place."
  }
}

run "network" {
  module {
    source = "./modules/network"
  }

  variables {
    availability_zones  = ["eu-central-1a", "eu-central-1b"]
    interface_endpoints = ["sts"]
    kms_key_arn         = run.key.arn
  }

  assert {
    condition     = length(output.private_subnet_ids) == 2 && length(output.public_subnet_ids) == 2
    error_message = "Each zone has a private and a public subnet."
  }
}

run "cluster" {
  module {
    source = "./modules/eks_cluster"
  }

  variables {
    subnet_ids  = run.network.private_subnet_ids
    kms_key_arn = run.key.arn
    addons      = []
    node_groups = {
      general = { instance_types = ["m7i.large"], least = 2, most = 4 }
      gpu     = { instance_types = ["g5.xlarge", "g6.xlarge"], least = 0, most = 2, gpu = true, spot = true }
    }
  }

  assert {
    condition     = strcontains(output.issuer_arn, trimprefix(output.issuer_url, "https://"))
    error_message = "Roles trust another issuer than the cluster's."
  }
}

run "alarms" {
  module {
    source = "./modules/budgets_and_alarms"
  }

  override_resource {
    target = aws_budgets_budget.this
  }

  variables {
    monthly_usd = 800
    emails      = ["team@example.org"]
    cost_tag    = { key = "stack", value = "cv-factory-moto" }
    kms_key_arn = run.key.arn
    databases   = { airflow = "cv-factory-moto-airflow" }
  }
}

run "endpoint" {
  module {
    source = "./modules/sagemaker_endpoint"
  }

  variables {
    endpoint       = "chest-xray"
    root           = "${run.storage.arn}/cv-factory/chest_xray"
    repository_arn = run.images.arns["inference"]
    kms_key_arn    = run.key.arn
    vpc            = { id = run.network.vpc_id, subnet_ids = run.network.private_subnet_ids }
    topic_arn      = run.alarms.topic_arn
  }

  assert {
    condition     = length(output.vpc.security_groups) == 1
    error_message = "The containers have no security group."
  }
}

run "iam" {
  module {
    source = "./modules/iam"
  }

  variables {
    issuer_arn = run.cluster.issuer_arn
    issuer_url = run.cluster.issuer_url
    components = {
      rollout = {
        description = "Rolls out"
        subjects    = ["system:serviceaccount:cv-factory:rollout"]
        writes      = ["${run.storage.arn}/cv-factory"]
        keys        = [run.key.arn]
        rolls_out   = { chest-xray = run.endpoint.role_arn }
      }
    }
  }

  assert {
    condition     = output.role_arns == { rollout = "arn:aws:iam::123456789012:role/cv-factory-moto-rollout" }
    error_message = "The role has another name than the charts are told."
  }
}

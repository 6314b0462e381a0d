mock_provider "aws" {
  source = "./tests/mocks"
}

variables {
  vpc_id      = "vpc-1"
  subnet_ids  = ["subnet-1", "subnet-2"]
  clients     = { cluster = "sg-1" }
  kms_key_arn = "arn:aws:kms:eu-central-1:123456789012:key/1"
}

run "a_database_is_private_encrypted_and_kept" {
  command = apply

  module {
    source = "./modules/rds_postgres"
  }

  variables {
    name     = "airflow"
    database = "airflow"
  }

  assert {
    condition     = !aws_db_instance.this.publicly_accessible && aws_db_instance.this.storage_encrypted && aws_db_instance.this.kms_key_id == var.kms_key_arn
    error_message = "The database is public, or its storage is not encrypted with the key."
  }

  assert {
    condition     = aws_db_instance.this.multi_az && aws_db_instance.this.deletion_protection && !aws_db_instance.this.skip_final_snapshot && aws_db_instance.this.backup_retention_period == 14
    error_message = "By default a database survives its zone and whoever deletes it."
  }

  assert {
    condition     = aws_db_instance.this.manage_master_user_password && aws_db_instance.this.password == null
    error_message = "A password lies in the state."
  }

  assert {
    condition     = anytrue([for parameter in aws_db_parameter_group.this.parameter : parameter.name == "rds.force_ssl" && parameter.value == "1"])
    error_message = "It takes connections without TLS."
  }

  assert {
    condition     = aws_db_parameter_group.this.family == "postgres17"
    error_message = "The parameters are another version's."
  }

  assert {
    condition     = [for rule in aws_vpc_security_group_ingress_rule.clients : [rule.referenced_security_group_id, rule.from_port, rule.to_port]] == [["sg-1", 5432, 5432]] && aws_vpc_security_group_ingress_rule.clients["cluster"].cidr_ipv4 == null
    error_message = "Others than the clients reach it."
  }
}

run "wrong_databases" {
  command = plan

  module {
    source = "./modules/rds_postgres"
  }

  variables {
    name           = "Airflow--1"
    database       = "air-flow"
    engine_version = "9.6"
    instance_class = "t4g.medium"
    backup_days    = 0
    storage_gib    = 5
    subnet_ids     = ["subnet-1"]
  }

  expect_failures = [
    var.name, var.database, var.engine_version, var.instance_class, var.backup_days, var.storage_gib, var.subnet_ids,
  ]
}

run "mlflow_alone_has_its_artifacts_and_its_password" {
  command = apply

  module {
    source = "./modules/mlflow_stack"
  }

  variables {
    name       = "cv-factory-dev"
    bucket     = "artifacts"
    log_bucket = "logs"
    issuer_arn = "arn:aws:iam::123456789012:oidc-provider/oidc.eks.eu-central-1.amazonaws.com/id/1"
    issuer_url = "https://oidc.eks.eu-central-1.amazonaws.com/id/1"
  }

  assert {
    condition     = output.settings.artifacts_destination == "s3://${module.artifacts.name}" && endswith(output.settings.database_secret, "rds!db-1")
    error_message = "The server is told another place."
  }
}

run "wrong_service_account" {
  command = plan

  module {
    source = "./modules/mlflow_stack"
  }

  variables {
    name            = "cv-factory-dev"
    bucket          = "artifacts"
    log_bucket      = "logs"
    issuer_arn      = "arn:aws:iam::123456789012:oidc-provider/oidc.eks.eu-central-1.amazonaws.com/id/1"
    issuer_url      = "https://oidc.eks.eu-central-1.amazonaws.com/id/1"
    service_account = "mlflow"
  }

  expect_failures = [var.service_account]
}

# The bucket of the states of an account, applied once by a person: it cannot hold its own state before it is there.
# docs/terraform.md tells how that state moves into it afterwards.

terraform {
  required_version = ">= 1.11"

  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = "~> 5.100"
    }
  }
}

provider "aws" {
  region              = var.region
  allowed_account_ids = [var.account_id]

  default_tags {
    tags = { system = var.name, managed-by = "terraform" }
  }
}

variable "name" {
  description = "What the bucket's name begins with."
  type        = string
  default     = "cv-factory"
}

variable "account_id" {
  description = "AWS account whose states lie in the bucket."
  type        = string

  validation {
    condition     = can(regex("^[0-9]{12}$", var.account_id))
    error_message = "account_id: twelve digits."
  }
}

variable "region" {
  description = "AWS region of the bucket."
  type        = string
}

module "key" {
  source = "../../modules/kms_key"

  name        = "${var.name}-state"
  description = "Terraform states of ${var.account_id}"
}

module "logs" {
  source = "../../modules/s3_bucket"

  name              = "${var.name}-state-logs-${var.account_id}"
  takes_access_logs = true
  expire            = { "s3/" = 365 }
}

module "state" {
  source = "../../modules/s3_bucket"

  name            = "${var.name}-state-${var.account_id}"
  kms_key_arn     = module.key.arn
  log_bucket      = module.logs.name
  noncurrent_days = 365
}

output "backend" {
  description = "What the backend files of the templates name."
  value       = { bucket = module.state.name, region = var.region, kms_key_id = module.key.alias }
}

terraform {
  required_version = ">= 1.11"

  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = "~> 5.100"
    }
  }

  backend "s3" {} # the place of the state: envs/<environment>.s3.tfbackend
}

provider "aws" {
  region              = var.region
  allowed_account_ids = [var.account_id]

  default_tags {
    tags = {
      system      = var.name
      environment = var.environment
      stack       = local.name
      managed-by  = "terraform"
    }
  }
}

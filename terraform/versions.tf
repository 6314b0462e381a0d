# Nothing is made here: this is where `terraform test` starts, so that one provider process answers for the tests of all modules.

terraform {
  required_version = ">= 1.11"

  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = "~> 5.100"
    }
  }
}

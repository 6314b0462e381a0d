mock_provider "aws" {
  source = "./tests/mocks"
}

run "nobody_outside_reads_a_bucket" {
  command = apply

  module {
    source = "./modules/s3_bucket"
  }

  variables {
    name        = "imaging-storage"
    kms_key_arn = "arn:aws:kms:eu-central-1:123456789012:key/1"
    log_bucket  = "imaging-logs"
    expire      = { "tmp/" = 3 }
  }

  assert {
    condition = alltrue([
      aws_s3_bucket_public_access_block.this.block_public_acls, aws_s3_bucket_public_access_block.this.block_public_policy,
      aws_s3_bucket_public_access_block.this.ignore_public_acls, aws_s3_bucket_public_access_block.this.restrict_public_buckets,
    ])
    error_message = "A way to make the bucket public is open."
  }

  assert {
    condition     = one(aws_s3_bucket_ownership_controls.this.rule).object_ownership == "BucketOwnerEnforced"
    error_message = "Access lists of objects count."
  }

  assert {
    condition     = one(one(aws_s3_bucket_server_side_encryption_configuration.this.rule).apply_server_side_encryption_by_default).sse_algorithm == "aws:kms"
    error_message = "A key was given, and objects are not encrypted with it."
  }

  assert {
    condition     = one(aws_s3_bucket_versioning.this.versioning_configuration).status == "Enabled"
    error_message = "What is overwritten is gone."
  }

  assert {
    condition = anytrue([
      for statement in jsondecode(aws_s3_bucket_policy.this.policy).Statement :
      statement.Effect == "Deny" && statement.Principal.AWS == "*" && statement.Condition.Bool["aws:SecureTransport"] == "false"
    ])
    error_message = "Requests without TLS are not denied."
  }

  assert {
    condition     = alltrue([for statement in jsondecode(aws_s3_bucket_policy.this.policy).Statement : statement.Effect == "Deny"])
    error_message = "The policy lets somebody in."
  }

  assert {
    condition     = length([for rule in aws_s3_bucket_lifecycle_configuration.this.rule : rule if length(rule.expiration) > 0 && try(rule.expiration[0].days, 0) == 3]) == 1
    error_message = "tmp/ does not expire after three days."
  }

  assert {
    condition     = aws_s3_bucket_logging.this[0].target_bucket == "imaging-logs" && !aws_s3_bucket.this.force_destroy
    error_message = "Access is not logged, or the bucket is destroyed with what it holds."
  }
}

run "a_bucket_of_logs_has_no_key_and_no_logs_itself" {
  command = apply

  module {
    source = "./modules/s3_bucket"
  }

  variables {
    name              = "imaging-logs"
    takes_access_logs = true
  }

  assert {
    condition     = one(one(aws_s3_bucket_server_side_encryption_configuration.this.rule).apply_server_side_encryption_by_default).sse_algorithm == "AES256"
    error_message = "S3 delivers access logs to buckets with SSE-S3 only."
  }

  assert {
    condition = one([
      for statement in jsondecode(aws_s3_bucket_policy.this.policy).Statement : statement if statement.Effect == "Allow"
    ]).Condition.StringEquals["aws:SourceAccount"] == "123456789012"
    error_message = "Logs of other accounts are let in."
  }

  assert {
    condition     = length(aws_s3_bucket_logging.this) == 0
    error_message = "A bucket that logs to itself grows for ever."
  }
}

run "wrong_buckets" {
  command = plan

  module {
    source = "./modules/s3_bucket"
  }

  variables {
    name              = "Imaging.Storage"
    kms_key_arn       = "arn:aws:kms:eu-central-1:123456789012:key/1"
    takes_access_logs = true
    noncurrent_days   = 0
    expire            = { "" = 30 }
  }

  expect_failures = [var.name, var.takes_access_logs, var.noncurrent_days, var.expire]
}

run "access_is_logged" {
  command = plan

  module {
    source = "./modules/s3_bucket"
  }

  variables {
    name = "imaging-storage"
  }

  expect_failures = [var.log_bucket]
}

run "a_key_is_rotated_and_used_by_this_account_alone" {
  command = apply

  module {
    source = "./modules/kms_key"
  }

  variables {
    name        = "imaging"
    description = "Studies"
  }

  assert {
    condition     = aws_kms_key.this.enable_key_rotation && aws_kms_key.this.deletion_window_in_days == 30
    error_message = "The key is not rotated, or gone too soon."
  }

  assert {
    condition = alltrue([
      for statement in jsondecode(aws_kms_key.this.policy).Statement :
      try(statement.Principal.AWS, "") == "arn:aws:iam::123456789012:root" || can(statement.Condition)
    ])
    error_message = "A service may use the key for anybody."
  }
}

run "wrong_keys" {
  command = plan

  module {
    source = "./modules/kms_key"
  }

  variables {
    name          = "aws/s3"
    description   = "Studies"
    deletion_days = 3
  }

  expect_failures = [var.name, var.deletion_days]
}

run "images_keep_their_tags" {
  command = apply

  module {
    source = "./modules/ecr"
  }

  variables {
    name         = "cv-factory-dev"
    repositories = ["trainer", "gateway"]
    kms_key_arn  = "arn:aws:kms:eu-central-1:123456789012:key/1"
  }

  assert {
    condition = alltrue([
      for repository in aws_ecr_repository.this : repository.image_tag_mutability == "IMMUTABLE" &&
      one(repository.image_scanning_configuration).scan_on_push && one(repository.encryption_configuration).encryption_type == "KMS"
    ])
    error_message = "A tag can be moved, or an image is not scanned, or not encrypted."
  }

  assert {
    condition     = aws_ecr_repository.this["trainer"].name == "cv-factory-dev/trainer"
    error_message = "Repositories are <name>/<image>."
  }

  assert {
    condition = alltrue([
      for policy in aws_ecr_lifecycle_policy.this : alltrue([for rule in jsondecode(policy.policy).rules : rule.selection.tagStatus == "untagged"])
    ])
    error_message = "Images that a tag names expire: an endpoint's earlier config may need them."
  }
}

run "wrong_repositories" {
  command = plan

  module {
    source = "./modules/ecr"
  }

  variables {
    name         = "cv-factory-dev"
    repositories = ["Trainer"]
    kms_key_arn  = "arn:aws:kms:eu-central-1:123456789012:key/1"
  }

  expect_failures = [var.repositories]
}

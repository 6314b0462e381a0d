variable "name" {
  description = "Name of the bucket, unique in the world."
  type        = string

  validation {
    condition     = can(regex("^[a-z0-9][a-z0-9-]{1,61}[a-z0-9]$", var.name))
    error_message = "name: 3 to 63 lower-case letters, digits and hyphens; a dot would break the certificate of https://<name>.s3..."
  }
}

variable "kms_key_arn" {
  description = "Key that encrypts the objects; null takes S3's own (SSE-S3), as a bucket that takes access logs needs it."
  type        = string
  default     = null
}

variable "log_bucket" {
  description = "Name of the bucket that takes this one's access logs, below `s3/<name>/`; null for that bucket itself."
  type        = string
  default     = null

  validation {
    condition     = var.takes_access_logs == (var.log_bucket == null)
    error_message = "log_bucket: every bucket but the one with takes_access_logs names where its access logs go."
  }
}

variable "takes_access_logs" {
  description = "Whether other buckets of this account may write their access logs here."
  type        = bool
  default     = false

  validation {
    condition     = !(var.takes_access_logs && var.kms_key_arn != null)
    error_message = "takes_access_logs: S3 delivers access logs to buckets without a KMS key only; set kms_key_arn to null."
  }
}

variable "noncurrent_days" {
  description = "Days for which overwritten and deleted objects can be brought back."
  type        = number
  default     = 30

  validation {
    condition     = var.noncurrent_days >= 1
    error_message = "noncurrent_days: at least 1."
  }
}

variable "expire" {
  description = "Prefix -> days after which objects below it are deleted. Captures are what drift checks and retraining read: keep them long enough."
  type        = map(number)
  default     = {}

  validation {
    condition     = alltrue([for prefix, days in var.expire : prefix != "" && days >= 1])
    error_message = "expire: a prefix, so that not the whole bucket expires, and at least one day."
  }
}

variable "force_destroy" {
  description = "Whether `terraform destroy` deletes the objects too."
  type        = bool
  default     = false
}

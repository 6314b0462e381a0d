variable "name" {
  description = "Identifier of the instance."
  type        = string

  validation {
    condition     = can(regex("^[a-z](?:-?[a-z0-9]){0,49}$", var.name))
    error_message = "name: up to 50 lower-case letters, digits and single hyphens, beginning with a letter."
  }
}

variable "database" {
  description = "Database that is made with the instance."
  type        = string

  validation {
    condition     = can(regex("^[a-z][a-z0-9_]{0,62}$", var.database))
    error_message = "database: lower-case letters, digits and _, beginning with a letter."
  }
}

variable "username" {
  description = "Name of the first user; RDS makes the password."
  type        = string
  default     = "cvf"

  validation {
    condition     = can(regex("^[a-z][a-z0-9_]{0,15}$", var.username)) && !contains(["admin", "owner", "user", "postgres"], var.username)
    error_message = "username: up to 16 lower-case letters, digits and _, and no key word of PostgreSQL: RDS refuses those."
  }
}

variable "vpc_id" {
  description = "VPC of the instance."
  type        = string
}

variable "subnet_ids" {
  description = "Private subnets, of two zones at least."
  type        = list(string)

  validation {
    condition     = length(var.subnet_ids) >= 2
    error_message = "subnet_ids: two at least, in different zones."
  }
}

variable "clients" {
  description = "Who may connect: a name for the rule -> security group."
  type        = map(string)
}

variable "kms_key_arn" {
  description = "Key that encrypts storage, password, logs and performance insights."
  type        = string
}

variable "engine_version" {
  description = "Major version of PostgreSQL, or major.minor."
  type        = string
  default     = "17"

  validation {
    condition     = can(regex("^1[4-9](\\.[0-9]+)?$", var.engine_version))
    error_message = "engine_version: 14 or newer, such as 17 or 17.5."
  }
}

variable "instance_class" {
  description = "Size of the instance."
  type        = string
  default     = "db.t4g.medium"

  validation {
    condition     = startswith(var.instance_class, "db.")
    error_message = "instance_class: begins with db., such as db.t4g.medium."
  }
}

variable "storage_gib" {
  description = "Storage at the start, GiB."
  type        = number
  default     = 20

  validation {
    condition     = var.storage_gib >= 20
    error_message = "storage_gib: 20 at least."
  }
}

variable "most_storage_gib" {
  description = "Up to which the storage grows by itself, GiB."
  type        = number
  default     = 200
}

variable "multi_az" {
  description = "Whether a standby in another zone takes over when this one fails."
  type        = bool
  default     = true
}

variable "backup_days" {
  description = "Days for which the database can be put back to any second."
  type        = number
  default     = 14

  validation {
    condition     = var.backup_days >= 1 && var.backup_days <= 35
    error_message = "backup_days: 1 to 35; 0 would switch backups off."
  }
}

variable "deletion_protection" {
  description = "Whether the instance refuses to be deleted; without it `terraform destroy` leaves no last snapshot either."
  type        = bool
  default     = true
}

variable "log_days" {
  description = "Days for which its logs are kept."
  type        = number
  default     = 365
}

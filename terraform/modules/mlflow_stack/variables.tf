variable "name" {
  description = "What the names of database and role begin with."
  type        = string
}

variable "bucket" {
  description = "Name of the bucket of artifacts, unique in the world."
  type        = string
}

variable "vpc_id" {
  description = "VPC of the database."
  type        = string
}

variable "subnet_ids" {
  description = "Private subnets of the database, of two zones at least."
  type        = list(string)
}

variable "clients" {
  description = "Who may connect to the database: a name for the rule -> security group."
  type        = map(string)
}

variable "kms_key_arn" {
  description = "Key that encrypts artifacts, database and password."
  type        = string
}

variable "log_bucket" {
  description = "Name of the bucket that takes the access logs of the artifacts."
  type        = string
}

variable "issuer_arn" {
  description = "IAM's OIDC provider of the cluster's service accounts."
  type        = string
}

variable "issuer_url" {
  description = "Address of that provider."
  type        = string
}

variable "service_account" {
  description = "The server's, `<namespace>:<name>`."
  type        = string
  default     = "mlflow:mlflow"

  validation {
    condition     = can(regex("^[a-z0-9-]+:[a-z0-9-]+$", var.service_account))
    error_message = "service_account: <namespace>:<name>."
  }
}

variable "instance_class" {
  description = "Size of the database."
  type        = string
  default     = "db.t4g.medium"
}

variable "multi_az" {
  description = "Whether a standby in another zone takes over."
  type        = bool
  default     = true
}

variable "deletion_protection" {
  description = "Whether database and artifacts refuse to be deleted."
  type        = bool
  default     = true
}

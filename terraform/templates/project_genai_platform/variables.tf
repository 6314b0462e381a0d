variable "name" {
  description = "What all names begin with."
  type        = string
  default     = "genai"

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{1,11}[a-z0-9]$", var.name))
    error_message = "name: 3 to 13 lower-case letters, digits and hyphens: names of roles hold it, the environment and an endpoint's in 64."
  }
}

variable "environment" {
  description = "One of dev, staging, prod; each has a state and, best, an account of its own."
  type        = string

  validation {
    condition     = contains(["dev", "staging", "prod"], var.environment)
    error_message = "environment: dev, staging or prod."
  }
}

variable "account_id" {
  description = "AWS account of this environment; credentials of another one are refused."
  type        = string

  validation {
    condition     = can(regex("^[0-9]{12}$", var.account_id))
    error_message = "account_id: twelve digits."
  }
}

variable "region" {
  description = "AWS region."
  type        = string

  validation {
    condition     = can(regex("^[a-z]{2}-[a-z]+-[0-9]$", var.region))
    error_message = "region: such as eu-central-1."
  }
}

variable "availability_zones" {
  description = "Zones of the region, two at least."
  type        = list(string)
}

variable "is_redundant" {
  description = "Whether an outage of one zone is survived: databases with a standby, a NAT gateway a zone."
  type        = bool
  default     = true
}

variable "is_protected" {
  description = "Whether databases, buckets and images refuse to be deleted while they hold anything."
  type        = bool
  default     = true

  validation {
    condition     = var.is_protected || var.environment != "prod"
    error_message = "is_protected: prod is protected."
  }
}

variable "cluster_admins" {
  description = "Name -> IAM role that administers the cluster."
  type        = map(string)
}

variable "cluster_networks" {
  description = "Networks that reach the cluster's API from outside; empty keeps it inside the VPC."
  type        = list(string)
  default     = []
}

variable "namespace" {
  description = "Namespace of the service accounts `indexer`, `retriever` and `llm`."
  type        = string
  default     = "genai"
}

variable "node_groups" {
  description = "Machines of the cluster; see module eks_cluster."
  type = map(object({
    instance_types = list(string)
    least          = number
    most           = number
    gpu            = optional(bool, false)
    spot           = optional(bool, false)
    disk_gib       = optional(number, 100)
    labels         = optional(map(string), {})
  }))
}

variable "monthly_usd" {
  description = "Budget of a month, US dollars."
  type        = number
}

variable "emails" {
  description = "Who is told of alarms and of the budget."
  type        = set(string)
}

variable "database_class" {
  description = "Size of the database of vectors; its index should fit into memory."
  type        = string
  default     = "db.r7g.large"
}

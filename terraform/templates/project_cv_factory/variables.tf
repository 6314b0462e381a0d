variable "name" {
  description = "What all names begin with."
  type        = string
  default     = "cv-factory"

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

variable "cidr" {
  description = "Addresses of the network."
  type        = string
  default     = "10.0.0.0/16"
}

variable "interface_endpoints" {
  description = "AWS services that are reached inside the network; see module network."
  type        = set(string)
  default     = []
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

variable "projects" {
  description = "Projects, by the `project` of their YAML; each has an endpoint, named like it with hyphens."
  type        = set(string)

  validation {
    condition     = alltrue([for project in var.projects : can(regex("^[a-z][a-z0-9_]{0,39}[a-z0-9]$", project))])
    error_message = "projects: lower-case letters, digits and _, as in the project's YAML."
  }

  validation {
    condition = length(setintersection(
      [for project in var.projects : replace(project, "_", "-")],
      ["airflow", "stages", "rollout", "gateway", "inference", "exporter", "mlflow", "ci-images", "cluster", "node", "cni", "ebs", "autoscaler", "flow-logs"],
    )) == 0
    error_message = "projects: named like a component or a part of the cluster, whose role would have the same name."
  }
}

variable "data_sources" {
  description = "Buckets of others that stages read: places, `<bucket ARN>/<prefix>`, and the KMS keys of these."
  type        = object({ places = list(string), keys = optional(list(string), []) })
  default     = { places = [] }
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

variable "cluster_addons" {
  description = "EKS's add-ons."
  type        = set(string)
  default     = ["vpc-cni", "kube-proxy", "coredns", "aws-ebs-csi-driver", "metrics-server"]
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

variable "namespace" {
  description = "Namespace of the charts' releases, one a project and named like its endpoint, and of the stages' pods."
  type        = string
  default     = "cv-factory"
}

variable "service_accounts" {
  description = "Component -> its service accounts, `<namespace>:<name>`, where they are not named as the charts name them."
  type        = map(list(string))
  default     = {}

  validation {
    condition     = length(setsubtract(keys(var.service_accounts), ["airflow", "stages", "rollout", "gateway", "inference", "exporter"])) == 0
    error_message = "service_accounts: components are airflow, stages, rollout, gateway, inference, exporter."
  }
}

variable "database_class" {
  description = "Size of the databases of Airflow and MLflow."
  type        = string
  default     = "db.t4g.medium"
}

variable "ci" {
  description = "The CI service that pushes images: its OIDC provider in IAM, and whose tokens count, such as `repo:<owner>/<name>:environment:dev`; GitLab's audience is its own address. Null where there is none."
  type        = object({ issuer_arn = string, issuer_url = string, subjects = list(string), audience = optional(string, "sts.amazonaws.com") })
  default     = null
}

variable "monthly_usd" {
  description = "Budget of a month, US dollars."
  type        = number
}

variable "emails" {
  description = "Who is told of alarms and of the budget."
  type        = set(string)
}

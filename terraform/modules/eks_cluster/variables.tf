variable "name" {
  description = "Name of the cluster."
  type        = string

  validation {
    condition     = can(regex("^[a-zA-Z0-9][a-zA-Z0-9_-]{0,39}$", var.name))
    error_message = "name: up to 40 letters, digits, _ and -: the names of its roles begin with it."
  }
}

variable "kubernetes_version" {
  description = "Version of Kubernetes, major.minor."
  type        = string
  default     = "1.33"

  validation {
    condition     = can(regex("^1\\.[0-9]{2}$", var.kubernetes_version))
    error_message = "kubernetes_version: major.minor, such as 1.33."
  }
}

variable "subnet_ids" {
  description = "Private subnets of nodes and API, of two zones at least."
  type        = list(string)
}

variable "kms_key_arn" {
  description = "Key that encrypts Kubernetes Secrets and the control plane's logs."
  type        = string
}

variable "public_access_cidrs" {
  description = "Networks that reach the API from outside; empty keeps it inside the VPC."
  type        = list(string)
  default     = []

  validation {
    condition     = alltrue([for cidr in var.public_access_cidrs : can(cidrhost(cidr, 0)) && !endswith(cidr, "/0")])
    error_message = "public_access_cidrs: networks such as 198.51.100.0/24, not the whole internet."
  }
}

variable "admin_role_arns" {
  description = "Name -> IAM role that administers the cluster; nobody else does, also not who makes it."
  type        = map(string)
  default     = {}
}

variable "node_groups" {
  description = <<-EOT
    Name -> machines.

    - `instance_types`: one for on-demand; several for spot, so that one that is short does not stop it.
    - `least`, `most`: how many there are; 0 costs nothing until the autoscaler is asked.
    - `gpu`: NVIDIA's image, and the taint `nvidia.com/gpu=present:NoSchedule`.
    - `spot`: cheaper, and taken away with two minutes' notice: for stages, which go on where they were, not for what serves.
    - `labels`: for `node_selector`.
  EOT
  type = map(object({
    instance_types = list(string)
    least          = number
    most           = number
    gpu            = optional(bool, false)
    spot           = optional(bool, false)
    disk_gib       = optional(number, 100)
    labels         = optional(map(string), {})
  }))

  validation {
    condition     = alltrue([for group in var.node_groups : 0 <= group.least && group.least <= group.most && group.most >= 1])
    error_message = "node_groups: least is 0 or more and at most most, which is 1 or more."
  }

  validation {
    condition     = anytrue([for group in var.node_groups : !group.gpu && !group.spot && group.least >= 1])
    error_message = "node_groups: one group without GPUs and without spot keeps a node at least: DNS and controllers run there."
  }
}

variable "addons" {
  description = "EKS's add-ons."
  type        = set(string)
  default     = ["vpc-cni", "kube-proxy", "coredns", "aws-ebs-csi-driver", "metrics-server"]
}

variable "log_days" {
  description = "Days for which the control plane's logs are kept."
  type        = number
  default     = 365
}

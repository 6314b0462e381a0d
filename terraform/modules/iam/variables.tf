variable "name" {
  description = "What the names of the roles begin with: `<name>-<component>`."
  type        = string
}

variable "issuer_arn" {
  description = "IAM's OIDC provider, whose tokens the components show: a cluster's (IRSA), or that of a CI service."
  type        = string
}

variable "issuer_url" {
  description = "The provider's address."
  type        = string

  validation {
    condition     = can(regex("^https://[^/]", var.issuer_url))
    error_message = "issuer_url: begins with https://."
  }
}

variable "audience" {
  description = "Whom the tokens are meant for."
  type        = string
  default     = "sts.amazonaws.com"
}

variable "components" {
  description = <<-EOT
    Component -> what it may do; a role each, and nothing that is not named here.

    - `subjects`: whose tokens it is taken with: `system:serviceaccount:<namespace>:<name>`, or a CI service's `repo:<owner>/<name>:environment:<environment>`.
    - `reads`, `adds`, `writes`: places on S3, `<bucket ARN>` or `<bucket ARN>/<prefix>`. Adding is to put objects, but not to read them; writing is to read, put and delete.
    - `keys`: KMS keys of these places and secrets.
    - `secrets`: ARNs in Secrets Manager, also with a * at their end.
    - `invokes`: SageMaker endpoints that it asks.
    - `rolls_out`: SageMaker endpoints that it brings bundles onto -> execution role of the containers.
    - `pushes`: ECR repositories, ARNs.
    - `session_hours`: for how long one token's credentials may live.
  EOT
  type = map(object({
    description   = string
    subjects      = list(string)
    reads         = optional(list(string), [])
    adds          = optional(list(string), [])
    writes        = optional(list(string), [])
    keys          = optional(list(string), [])
    secrets       = optional(list(string), [])
    invokes       = optional(list(string), [])
    rolls_out     = optional(map(string), {})
    pushes        = optional(list(string), [])
    session_hours = optional(number, 1)
  }))

  validation {
    condition     = alltrue([for component in var.components : length(component.subjects) > 0 && !anytrue([for subject in component.subjects : strcontains(subject, "*")])])
    error_message = "components: subjects names at least one caller, and none by a pattern: whoever it fits could take the role."
  }

  validation {
    condition     = !anytrue([for component in var.components : anytrue([for place in concat(component.reads, component.adds, component.writes) : strcontains(place, "*") || endswith(place, "/")])])
    error_message = "components: places are <bucket ARN>/<prefix>, without * and without a / at the end."
  }
}

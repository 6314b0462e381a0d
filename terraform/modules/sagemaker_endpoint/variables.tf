variable "name" {
  description = "What the names of role, security group and alarms begin with."
  type        = string
}

variable "endpoint" {
  description = "Name of the endpoint: the project's, with hyphens for underscores."
  type        = string

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{0,39}[a-z0-9]$", var.endpoint))
    error_message = "endpoint: as `cvf` names it: the project's name with hyphens, such as chest-xray for chest_xray."
  }
}

variable "root" {
  description = "The project's place on S3, `<bucket ARN>/<prefix>/<project>`."
  type        = string

  validation {
    condition     = can(regex("^arn:[^:]+:s3:::[^/*]+/[^*]*[^/*]$", var.root))
    error_message = "root: <bucket ARN>/<prefix>/<project>, without a / at the end."
  }
}

variable "repository_arn" {
  description = "ECR repository of the inference image."
  type        = string
}

variable "kms_key_arn" {
  description = "Key of bundles, captures, logs and the instances' volumes."
  type        = string
}

variable "vpc" {
  description = "VPC and private subnets in which the containers run; null takes SageMaker's own network."
  type        = object({ id = string, subnet_ids = list(string) })
  default     = null
}

variable "latency_ms" {
  description = "The 99th percentile of the model's answers above which people are told, milliseconds."
  type        = number
  default     = 2000

  validation {
    condition     = var.latency_ms > 0
    error_message = "latency_ms: more than 0."
  }
}

variable "topic_arn" {
  description = "SNS topic that the alarms go to."
  type        = string
}

variable "log_days" {
  description = "Days for which the containers' logs are kept."
  type        = number
  default     = 365
}

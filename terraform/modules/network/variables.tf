variable "name" {
  description = "Name of the network, and what the names of its parts begin with."
  type        = string
}

variable "cidr" {
  description = "Addresses of the network. A sixteenth is a private subnet, a 256th a public one."
  type        = string
  default     = "10.0.0.0/16"

  validation {
    condition     = can(cidrhost(var.cidr, 0)) && can(regex("/(1[6-9]|20)$", var.cidr))
    error_message = "cidr: a block from /16 to /20, such as 10.0.0.0/16."
  }
}

variable "availability_zones" {
  description = "Zones that get a private and a public subnet each."
  type        = list(string)

  validation {
    condition     = length(var.availability_zones) >= 2 && length(var.availability_zones) <= 4 && length(distinct(var.availability_zones)) == length(var.availability_zones)
    error_message = "availability_zones: two to four different ones; EKS and RDS ask for two."
  }
}

variable "single_nat_gateway" {
  description = "One NAT gateway for all zones: cheaper, and an outage of its zone cuts off the others from the internet."
  type        = bool
  default     = false
}

variable "interface_endpoints" {
  description = "AWS services that are reached inside the network, such as `sts`, `ecr.api`, `ecr.dkr`, `sagemaker.api`, `sagemaker.runtime`; each costs by the hour and zone. S3 is always reached inside, which is free."
  type        = set(string)
  default     = []
}

variable "kms_key_arn" {
  description = "Key that encrypts the flow logs."
  type        = string
}

variable "log_days" {
  description = "Days for which flow logs are kept."
  type        = number
  default     = 365
}

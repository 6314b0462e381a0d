variable "name" {
  description = "What the names of the repositories begin with."
  type        = string
}

variable "repositories" {
  description = "Images, a repository each: `<name>/<image>`."
  type        = set(string)

  validation {
    condition     = length(var.repositories) > 0 && alltrue([for image in var.repositories : can(regex("^[a-z0-9]+(?:[._-][a-z0-9]+)*$", image))])
    error_message = "repositories: at least one; lower-case letters and digits, with . _ or - between them."
  }
}

variable "kms_key_arn" {
  description = "Key that encrypts the images."
  type        = string
}

variable "untagged_days" {
  description = "Days after which an image without a tag is deleted."
  type        = number
  default     = 14
}

variable "force_delete" {
  description = "Whether `terraform destroy` deletes repositories that hold images."
  type        = bool
  default     = false
}

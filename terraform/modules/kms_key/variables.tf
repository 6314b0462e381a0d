variable "name" {
  description = "Alias of the key, without `alias/`."
  type        = string

  validation {
    condition     = can(regex("^[a-zA-Z0-9/_-]{1,250}$", var.name)) && !startswith(var.name, "aws/")
    error_message = "name: letters, digits, / _ and -, and not aws/..., which is AWS's own."
  }
}

variable "description" {
  description = "What the key encrypts."
  type        = string
}

variable "deletion_days" {
  description = "Days between the request to delete the key and the end of everything that it encrypts."
  type        = number
  default     = 30

  validation {
    condition     = var.deletion_days >= 7 && var.deletion_days <= 30
    error_message = "deletion_days: 7 to 30."
  }
}

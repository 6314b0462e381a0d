variable "name" {
  description = "Name of the budget, and what the names of topic and alarms begin with."
  type        = string
}

variable "monthly_usd" {
  description = "Budget of a month, US dollars."
  type        = number

  validation {
    condition     = var.monthly_usd > 0
    error_message = "monthly_usd: more than 0."
  }
}

variable "notify_at" {
  description = "Percentages of the budget at which people are told, of what was spent or of what is forecast."
  type        = list(object({ percent = number, forecast = bool }))
  default     = [{ percent = 50, forecast = false }, { percent = 90, forecast = false }, { percent = 100, forecast = true }]

  validation {
    condition     = length(var.notify_at) >= 1 && length(var.notify_at) <= 5
    error_message = "notify_at: one to five, as AWS allows."
  }
}

variable "cost_tag" {
  description = "Tag by which this budget's costs are known."
  type        = object({ key = string, value = string })
}

variable "emails" {
  description = "Who is told; each confirms once."
  type        = set(string)

  validation {
    condition     = length(var.emails) > 0 && alltrue([for email in var.emails : can(regex("^[^@ ]+@[^@ ]+$", email))])
    error_message = "emails: one address at least; an alarm that nobody hears is none."
  }
}

variable "kms_key_arn" {
  description = "Key that encrypts the messages; CloudWatch and Budgets must be allowed to use it (module kms_key)."
  type        = string
}

variable "databases" {
  description = "Name of the alarm -> identifier of a database on RDS."
  type        = map(string)
  default     = {}
}

variable "free_storage_gib" {
  description = "Free storage of a database below which people are told, GiB."
  type        = number
  default     = 5
}

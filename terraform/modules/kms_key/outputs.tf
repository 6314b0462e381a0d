output "arn" {
  description = "ARN of the key."
  value       = aws_kms_key.this.arn
}

output "alias" {
  description = "Its alias, as `deploy.kms_key` takes it."
  value       = aws_kms_alias.this.name
}

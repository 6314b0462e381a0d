output "id" {
  description = "Identifier of the instance, by which alarms name it."
  value       = aws_db_instance.this.identifier
}

output "address" {
  description = "Host name."
  value       = aws_db_instance.this.address
}

output "database" {
  description = "Name of the database."
  value       = aws_db_instance.this.db_name
}

output "secret_arn" {
  description = "Secret in Secrets Manager with `username` and `password`."
  value       = aws_db_instance.this.master_user_secret[0].secret_arn
}

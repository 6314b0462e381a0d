output "role_arn" {
  description = "Role of the server's service account."
  value       = module.iam.role_arns["mlflow"]
}

output "database_id" {
  description = "Identifier of the database, by which alarms name it."
  value       = module.database.id
}

output "settings" {
  description = "What the server is started with; `username` and `password` lie in the secret, and RDS changes the password every week."
  value = {
    artifacts_destination = "s3://${module.artifacts.name}"
    database_host         = module.database.address
    database_name         = module.database.database
    database_secret       = module.database.secret_arn
  }
}

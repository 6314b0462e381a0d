output "urls" {
  description = "Image -> what it is pushed to and pulled from, without a tag."
  value       = { for image, repository in aws_ecr_repository.this : image => repository.repository_url }
}

output "arns" {
  description = "Image -> ARN of its repository."
  value       = { for image, repository in aws_ecr_repository.this : image => repository.arn }
}

output "vpc_id" {
  description = "Id of the VPC."
  value       = aws_vpc.this.id
}

output "private_subnet_ids" {
  description = "Subnets without public addresses, in the order of the zones: nodes, databases, endpoints."
  value       = [for zone in var.availability_zones : aws_subnet.private[zone].id]

  # What runs in them needs the way out.
  depends_on = [aws_route.nat, aws_route_table_association.private]
}

output "public_subnet_ids" {
  description = "Subnets of load balancers that face the internet."
  value       = [for zone in var.availability_zones : aws_subnet.public[zone].id]
}

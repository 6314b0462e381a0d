mock_provider "aws" {
  source = "./tests/mocks"
}

variables {
  kms_key_arn = "arn:aws:kms:eu-central-1:123456789012:key/1"
}

run "nothing_in_the_network_is_public_by_itself" {
  command = apply

  module {
    source = "./modules/network"
  }

  variables {
    name               = "imaging"
    availability_zones = ["eu-central-1a", "eu-central-1b", "eu-central-1c"]
  }

  assert {
    condition = alltrue([
      for subnet in concat(values(aws_subnet.private), values(aws_subnet.public)) : subnet.map_public_ip_on_launch != true
    ])
    error_message = "Machines get public addresses."
  }

  assert {
    condition     = length(distinct([for subnet in concat(values(aws_subnet.private), values(aws_subnet.public)) : subnet.cidr_block])) == 6
    error_message = "Three zones have six subnets with addresses of their own."
  }

  assert {
    condition     = length(aws_nat_gateway.this) == 3 && length(distinct([for route in aws_route.nat : route.nat_gateway_id])) == 3
    error_message = "An outage of one zone cuts off another."
  }

  assert {
    condition     = length(aws_default_security_group.this.ingress) == 0 && length(aws_default_security_group.this.egress) == 0
    error_message = "What names no security group is reached."
  }

  assert {
    condition     = aws_vpc_endpoint.s3.vpc_endpoint_type == "Gateway" && length(aws_vpc_endpoint.s3.route_table_ids) == 3
    error_message = "Studies pass by the NAT gateway."
  }

  assert {
    condition     = aws_flow_log.this.traffic_type == "ALL" && aws_cloudwatch_log_group.flow.kms_key_id == var.kms_key_arn
    error_message = "Traffic is not logged, or the log is not encrypted."
  }
}

run "one_gateway_where_that_is_enough" {
  command = apply

  module {
    source = "./modules/network"
  }

  variables {
    name                = "imaging"
    availability_zones  = ["eu-central-1a", "eu-central-1b"]
    single_nat_gateway  = true
    interface_endpoints = ["sts"]
  }

  assert {
    condition     = length(aws_nat_gateway.this) == 1 && length(aws_route.nat) == 2
    error_message = "Both zones go out by the one gateway."
  }

  assert {
    condition     = aws_vpc_endpoint.this["sts"].service_name == "com.amazonaws.eu-central-1.sts" && aws_vpc_endpoint.this["sts"].private_dns_enabled
    error_message = "STS is not reached inside the network."
  }
}

run "wrong_networks" {
  command = plan

  module {
    source = "./modules/network"
  }

  variables {
    name               = "imaging"
    cidr               = "10.0.0.0/28"
    availability_zones = ["eu-central-1a"]
  }

  expect_failures = [var.cidr, var.availability_zones]
}

run "a_cluster_is_private_and_its_pods_have_roles_of_their_own" {
  command = apply

  module {
    source = "./modules/eks_cluster"
  }

  variables {
    name       = "imaging"
    subnet_ids = ["subnet-1", "subnet-2"]
    node_groups = {
      general = { instance_types = ["m7i.large"], least = 2, most = 4 }
      gpu     = { instance_types = ["g5.xlarge", "g6.xlarge"], least = 0, most = 2, gpu = true, spot = true, labels = { accelerator = "gpu" } }
    }
  }

  assert {
    condition     = one(aws_eks_cluster.this.vpc_config).endpoint_private_access && !one(aws_eks_cluster.this.vpc_config).endpoint_public_access
    error_message = "The API is open to the internet."
  }

  assert {
    condition     = one(aws_eks_cluster.this.encryption_config).resources == toset(["secrets"]) && one(one(aws_eks_cluster.this.encryption_config).provider).key_arn == var.kms_key_arn
    error_message = "Secrets are not encrypted with the key."
  }

  assert {
    condition     = length(aws_eks_cluster.this.enabled_cluster_log_types) == 5 && !one(aws_eks_cluster.this.access_config).bootstrap_cluster_creator_admin_permissions
    error_message = "Logs are missing, or whoever makes the cluster keeps it."
  }

  assert {
    condition     = aws_eks_node_group.this["gpu"].capacity_type == "SPOT" && aws_eks_node_group.this["gpu"].ami_type == "AL2023_x86_64_NVIDIA" && one(aws_eks_node_group.this["gpu"].scaling_config).min_size == 0
    error_message = "The GPU group is not of spot machines with NVIDIA's image, which come when they are asked for."
  }

  assert {
    condition     = one(aws_eks_node_group.this["gpu"].taint).key == "nvidia.com/gpu" && one(aws_eks_node_group.this["gpu"].taint).effect == "NO_SCHEDULE" && length(aws_eks_node_group.this["general"].taint) == 0
    error_message = "Any pod stands on machines with GPUs, or none on those without."
  }

  assert {
    condition = alltrue([
      for template in aws_launch_template.node : one(template.metadata_options).http_tokens == "required" &&
      one(template.metadata_options).http_put_response_hop_limit == 1 && tobool(one(one(template.block_device_mappings).ebs).encrypted)
    ])
    error_message = "Pods reach the node's role, or disks are not encrypted."
  }

  assert {
    condition = alltrue([
      for role in aws_iam_role.account :
      startswith(one(jsondecode(role.assume_role_policy).Statement).Condition.StringEquals["oidc.eks.eu-central-1.amazonaws.com/id/1:sub"], "system:serviceaccount:kube-system:")
    ])
    error_message = "A role of the cluster is taken by other accounts than its own."
  }

  assert {
    condition     = length([for attachment in aws_iam_role_policy_attachment.node : attachment if strcontains(attachment.policy_arn, "CNI")]) == 0
    error_message = "Nodes may do what only the network add-on has to."
  }

  assert {
    condition     = jsondecode(aws_eks_addon.before_nodes["vpc-cni"].configuration_values).enableNetworkPolicy == "true"
    error_message = "Nothing enforces network policies."
  }

  assert {
    condition     = jsondecode(aws_eks_addon.after_nodes["aws-ebs-csi-driver"].configuration_values).defaultStorageClass.enabled
    error_message = "Claims without a class find no volume."
  }

  assert {
    condition = alltrue([
      for template in aws_launch_template.node :
      toset(template.tag_specifications[*].resource_type) == toset(["instance", "volume", "network-interface"]) &&
      alltrue([for given in template.tag_specifications : given.tags["stack"] == "imaging"])
    ])
    error_message = "The budget, which counts by the tag, does not see the machines."
  }
}

run "wrong_clusters" {
  command = plan

  module {
    source = "./modules/eks_cluster"
  }

  variables {
    name                = "an imaging cluster"
    kubernetes_version  = "1.33.1"
    subnet_ids          = ["subnet-1", "subnet-2"]
    public_access_cidrs = ["0.0.0.0/0"]
    node_groups         = { gpu = { instance_types = ["g5.xlarge"], least = 3, most = 2, gpu = true } }
  }

  expect_failures = [var.name, var.kubernetes_version, var.public_access_cidrs, var.node_groups]
}

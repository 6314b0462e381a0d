mock_provider "aws" {
  source = "./tests/mocks"
}

variables {
  name        = "cv-factory-dev"
  issuer_arn  = "arn:aws:iam::123456789012:oidc-provider/oidc.example/id/1"
  issuer_url  = "https://oidc.example/id/1"
  kms_key_arn = "arn:aws:kms:eu-central-1:123456789012:key/1"
  topic_arn   = "arn:aws:sns:eu-central-1:123456789012:alarms"
}

run "a_component_may_do_what_it_says_and_nothing_else" {
  command = apply

  module {
    source = "./modules/iam"
  }

  variables {
    components = {
      rollout = {
        description = "Rolls out"
        subjects    = ["system:serviceaccount:cv-factory:rollout"]
        reads       = ["arn:aws:s3:::hospital/chest"]
        writes      = ["arn:aws:s3:::imaging/cv-factory"]
        keys        = ["arn:aws:kms:eu-central-1:123456789012:key/1"]
        secrets     = ["arn:aws:secretsmanager:eu-central-1:123456789012:secret:cv-factory-dev/rollout/*"]
        rolls_out   = { chest-xray = "arn:aws:iam::123456789012:role/cv-factory-dev-chest-xray" }
        pushes      = ["arn:aws:ecr:eu-central-1:123456789012:repository/cv-factory-dev/gateway"]
      }
      gateway = {
        description = "Asks"
        subjects    = ["system:serviceaccount:cv-factory:gateway"]
        adds        = ["arn:aws:s3:::imaging/cv-factory/chest_xray/labels"]
        invokes     = ["chest-xray"]
      }
    }
  }

  assert {
    condition = alltrue(flatten([
      for policy in aws_iam_role_policy.this : [
        for statement in jsondecode(policy.policy).Statement : [for action in statement.Action : !strcontains(action, "*")]
      ]
    ]))
    error_message = "An action has a * in it."
  }

  # What knows no resource of its own; https://docs.aws.amazon.com/service-authorization/latest/reference/
  assert {
    condition = alltrue(flatten([
      for policy in aws_iam_role_policy.this : [
        for statement in jsondecode(policy.policy).Statement : [
          for action in statement.Action : contains(["application-autoscaling:DescribeScalableTargets", "ecr:GetAuthorizationToken"], action)
        ] if contains(flatten([statement.Resource]), "*")
      ]
    ]))
    error_message = "An action is allowed on every resource."
  }

  assert {
    condition = toset(flatten([for statement in jsondecode(aws_iam_role_policy.this["gateway"].policy).Statement : statement.Action])) == toset([
      "s3:PutObject", "s3:AbortMultipartUpload", "sagemaker:InvokeEndpoint", "sagemaker:DescribeEndpoint",
    ])
    error_message = "Who asks an endpoint and adds labels may do something else."
  }

  assert {
    condition = one([
      for statement in jsondecode(aws_iam_role_policy.this["rollout"].policy).Statement : statement if statement.Sid == "ExecutionRoles"
      ]) == {
      Sid       = "ExecutionRoles"
      Effect    = "Allow"
      Action    = ["iam:PassRole"]
      Resource  = ["arn:aws:iam::123456789012:role/cv-factory-dev-chest-xray"]
      Condition = { StringEquals = { "iam:PassedToService" = "sagemaker.amazonaws.com" } }
    }
    error_message = "Another role, or one for another service, can be passed."
  }

  assert {
    condition = alltrue([
      for statement in jsondecode(aws_iam_role_policy.this["rollout"].policy).Statement :
      !anytrue([for resource in statement.Resource : strcontains(resource, ":::hospital")]) if contains(["Add", "Remove"], statement.Sid)
    ])
    error_message = "What is only read can be written."
  }

  assert {
    condition = one(jsondecode(aws_iam_role.this["gateway"].assume_role_policy).Statement).Condition.StringEquals == {
      "oidc.example/id/1:sub" = ["system:serviceaccount:cv-factory:gateway"]
      "oidc.example/id/1:aud" = "sts.amazonaws.com"
    }
    error_message = "Another service account takes the role."
  }
}

run "nobody_takes_a_role_by_a_pattern" {
  command = plan

  module {
    source = "./modules/iam"
  }

  variables {
    components = { gateway = { description = "Asks", subjects = ["system:serviceaccount:*:gateway"] } }
  }

  expect_failures = [var.components]
}

run "places_name_no_more_than_one_folder" {
  command = plan

  module {
    source = "./modules/iam"
  }

  variables {
    components = {
      stages = { description = "Writes", subjects = ["system:serviceaccount:cv-factory:stages"], writes = ["arn:aws:s3:::*"] }
    }
  }

  expect_failures = [var.components]
}

run "containers_read_bundles_and_write_captures" {
  command = apply

  module {
    source = "./modules/sagemaker_endpoint"
  }

  variables {
    endpoint       = "chest-xray"
    root           = "arn:aws:s3:::imaging/cv-factory/chest_xray"
    repository_arn = "arn:aws:ecr:eu-central-1:123456789012:repository/cv-factory-dev/inference"
    vpc            = { id = "vpc-1", subnet_ids = ["subnet-1"] }
  }

  assert {
    condition = toset(flatten([
      for statement in jsondecode(aws_iam_role_policy.this.policy).Statement : statement.Resource if contains(statement.Action, "s3:GetObject")
    ])) == toset(["arn:aws:s3:::imaging/cv-factory/chest_xray/models/*", "arn:aws:s3:::imaging/cv-factory/chest_xray/async/in/*"])
    error_message = "Containers read more than bundles and asynchronous requests."
  }

  assert {
    condition = alltrue(flatten([
      for statement in jsondecode(aws_iam_role_policy.this.policy).Statement : [for action in statement.Action : !strcontains(action, "*")]
    ]))
    error_message = "An action has a * in it."
  }

  assert {
    condition     = length([for statement in jsondecode(aws_iam_role_policy.this.policy).Statement : statement if contains(statement.Action, "ec2:CreateNetworkInterface")]) == 1
    error_message = "Containers get no interface in the VPC."
  }

  assert {
    condition     = one(jsondecode(aws_iam_role.this.assume_role_policy).Statement).Condition.StringEquals["aws:SourceAccount"] == "123456789012"
    error_message = "SageMaker takes the role on behalf of another account."
  }

  assert {
    condition     = aws_cloudwatch_log_group.this.name == "/aws/sagemaker/Endpoints/chest-xray" && aws_cloudwatch_log_group.this.kms_key_id == var.kms_key_arn
    error_message = "SageMaker writes to another group, or it is not encrypted."
  }

  assert {
    condition     = alltrue([for alarm in aws_cloudwatch_metric_alarm.this : !startswith(alarm.alarm_name, "cvf/") && alarm.dimensions["VariantName"] == "AllTraffic"])
    error_message = "An alarm of Terraform's is one that `cvf deploy` removes, or watches no variant."
  }

  assert {
    condition     = aws_cloudwatch_metric_alarm.this["latency"].threshold == 2000000
    error_message = "ModelLatency is measured in microseconds."
  }
}

run "without_a_vpc_nothing_of_one_is_allowed" {
  command = apply

  module {
    source = "./modules/sagemaker_endpoint"
  }

  variables {
    endpoint       = "chest-xray"
    root           = "arn:aws:s3:::imaging/cv-factory/chest_xray"
    repository_arn = "arn:aws:ecr:eu-central-1:123456789012:repository/cv-factory-dev/inference"
  }

  assert {
    condition     = output.vpc == null && length(aws_security_group.this) == 0 && !strcontains(aws_iam_role_policy.this.policy, "ec2:")
    error_message = "There is a network where none was given."
  }
}

run "wrong_endpoints" {
  command = plan

  module {
    source = "./modules/sagemaker_endpoint"
  }

  variables {
    endpoint       = "chest_xray"
    root           = "s3://imaging/cv-factory/chest_xray/"
    repository_arn = "arn:aws:ecr:eu-central-1:123456789012:repository/cv-factory-dev/inference"
    latency_ms     = 0
  }

  expect_failures = [var.endpoint, var.root, var.latency_ms]
}

run "a_budget_and_a_full_disk_are_told" {
  command = apply

  module {
    source = "./modules/budgets_and_alarms"
  }

  variables {
    monthly_usd = 800
    emails      = ["team@example.org"]
    cost_tag    = { key = "stack", value = "cv-factory-dev" }
    databases   = { airflow = "cv-factory-dev-airflow" }
  }

  assert {
    condition     = aws_budgets_budget.this.limit_amount == "800" && one(aws_budgets_budget.this.cost_filter).values == tolist(["user:stack$cv-factory-dev"])
    error_message = "The budget is of another sum, or of other costs."
  }

  assert {
    condition     = toset([for notification in aws_budgets_budget.this.notification : notification.threshold]) == toset([50, 90, 100])
    error_message = "People are told at other shares of the budget."
  }

  assert {
    condition     = aws_cloudwatch_metric_alarm.storage["airflow"].threshold == 5368709120 && aws_cloudwatch_metric_alarm.storage["airflow"].alarm_actions == toset([aws_sns_topic.this.arn])
    error_message = "A full disk is told too late, or to nobody."
  }

  assert {
    condition     = aws_sns_topic.this.kms_master_key_id == var.kms_key_arn && one(jsondecode(aws_sns_topic_policy.this.policy).Statement).Condition.StringEquals["aws:SourceAccount"] == "123456789012"
    error_message = "Messages are not encrypted, or other accounts write."
  }
}

run "a_budget_that_nobody_hears" {
  command = plan

  module {
    source = "./modules/budgets_and_alarms"
  }

  variables {
    monthly_usd = 0
    emails      = []
    notify_at   = []
    cost_tag    = { key = "stack", value = "cv-factory-dev" }
  }

  expect_failures = [var.monthly_usd, var.emails, var.notify_at]
}

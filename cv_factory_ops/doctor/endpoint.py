"""Where the model will be served: the local endpoint, SageMaker with all that AWS must grant it, Vertex AI, Azure ML.

Nothing is made and nothing is paid for: all calls describe, list or simulate.
https://docs.aws.amazon.com/IAM/latest/APIReference/API_SimulatePrincipalPolicy.html,
https://docs.aws.amazon.com/servicequotas/2019-06-24/apireference/API_ListServiceQuotas.html
"""

from __future__ import annotations

import functools
import json
import os
import re
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any, assert_never

from cv_factory_ops.config import ProjectConfig
from cv_factory_ops.config.deploy import AzureDeploy, LocalDeploy, SageMakerDeploy, ServerlessInference, VertexDeploy
from cv_factory_ops.deploy import local, sagemaker
from cv_factory_ops.deploy.rollout import open_deployer
from cv_factory_ops.doctor.findings import QUESTION_SECONDS, CannotTell, Check, Finding, fail, ok, warn
from cv_factory_ops.errors import ConfigError

ECR = re.compile(
    r"(?P<account>\d{12})\.dkr\.ecr\.(?P<region>[a-z0-9-]+)\.amazonaws\.com(\.cn)?/(?P<name>[^:@]+)(?P<version>[:@].+)?"
)
ACTIONS = {
    "endpoint/{name}": "CreateEndpoint UpdateEndpoint DeleteEndpoint DescribeEndpoint InvokeEndpoint ListTags AddTags",
    "endpoint-config/{name}-any": "CreateEndpointConfig DescribeEndpointConfig CreateEndpoint UpdateEndpoint",
    "model/{name}-any": "CreateModel DescribeModel",
}
"""What ``deploy``, ``verify`` and ``promote`` ask SageMaker for, by resource; a role may be held to the endpoint's own."""
NO_LOGIN = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "TokenRetrievalError", "SSOTokenLoadError"}
BAD_LOGIN = {
    "InvalidClientTokenId",
    "UnrecognizedClientException",
    "ExpiredToken",
    "ExpiredTokenException",
    "SignatureDoesNotMatch",
}
MAY_NOT_ASK = {"AccessDenied", "AccessDeniedException", "AuthorizationError", "UnauthorizedOperation"}
Question = Callable[[ProjectConfig, SageMakerDeploy, Any], Iterator[Finding]]


def checks(config: ProjectConfig) -> list[Check]:
    """What to look at, by where the project is deployed."""
    match config.deploy:
        case LocalDeploy():
            return [Check("deploy.local", _local)]
        case SageMakerDeploy():
            asked = {"identity": _identity, "role": _role, "rights": _rights, "image": _image}
            asked |= {"quota": _quota, "endpoint": _endpoint, "storage": _storage, "kms": _kms, "vpc": _vpc}
            return [Check(f"deploy.{name}", functools.partial(_on_aws, question)) for name, question in asked.items()]
        case VertexDeploy() | AzureDeploy():
            return [Check(f"deploy.{config.deploy.kind}", _served, "log in, and check the names below deploy")]
        case other:
            assert_never(other)


def _local(config: ProjectConfig) -> Iterator[Finding]:
    url = (os.environ.get("AWS_ENDPOINT_URL_SAGEMAKER") or str(getattr(config.deploy, "url", ""))).rstrip("/")
    if local.answers(url):
        yield ok("deploy.local", f"{url} answers")
    elif urllib.parse.urlsplit(url).hostname in local.LOOPBACK:
        yield ok("deploy.local", f"{url} is free; the stage deploy starts an endpoint there")
    else:
        yield fail("deploy.local", f"{url}: nothing answers, and it is not this machine", "start `cvf endpoint` on it")


def _served(config: ProjectConfig) -> Iterator[Finding]:
    """One question for the endpoint proves login, project or workspace, and region."""
    found = open_deployer(config).serving()
    told = (
        f"endpoint {config.endpoint_name} is {found.status}" if found else f"endpoint {config.endpoint_name} is not there yet"
    )
    yield ok(f"deploy.{config.deploy.kind}", f"the service lets us in; {told}")
    yield warn(
        f"deploy.{config.deploy.kind}.rights", "the rights to create and the quotas are not looked at", "see docs/rollout.md"
    )


def _on_aws(question: Question, config: ProjectConfig) -> Iterator[Finding]:
    """Ask; what AWS's clients raise is turned into one line."""
    assert isinstance(config.deploy, SageMakerDeploy)  # noqa: S101 - by `checks`
    from botocore.config import Config

    patience = Config(connect_timeout=5, read_timeout=QUESTION_SECONDS, retries={"total_max_attempts": 2})
    try:
        client = functools.partial(sagemaker.session(config).client, config=patience)
        yield from question(config, config.deploy, client)
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in {"botocore", "boto3"}:
            raise
        raise _explained(error) from None


def _explained(error: Exception) -> Exception:
    code = _code(error)
    if type(error).__name__ in NO_LOGIN:
        return ConfigError("no AWS credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or a role")
    if code in BAD_LOGIN:
        return ConfigError(f"AWS does not take the credentials ({code}); make new ones")
    operation = getattr(error, "operation_name", "")
    if code in MAY_NOT_ASK:
        return CannotTell(f"this account may not ask {operation}")
    return CannotTell(f"AWS answered {operation} with {code or type(error).__name__}")


def _code(error: Exception) -> str:
    return str(getattr(error, "response", {}).get("Error", {}).get("Code", ""))


def _identity(config: ProjectConfig, deploy: SageMakerDeploy, client: Any) -> Iterator[Finding]:
    found = client("sts").get_caller_identity()
    region = client("sts").meta.region_name
    yield ok("deploy.identity", f"{found['Arn']} in {region}")
    if (account := deploy.role_arn.split(":")[4:5]) and account[0] != found["Account"]:
        yield warn("deploy.identity.account", f"deploy.role_arn is of account {account[0]}, this login of {found['Account']}")


def _role(config: ProjectConfig, deploy: SageMakerDeploy, client: Any) -> Iterator[Finding]:
    """The execution role is there, and SageMaker may assume it."""
    name = deploy.role_arn.rpartition("/")[2]
    if not re.fullmatch(r"arn:[a-z-]+:iam::\d{12}:role/.+", deploy.role_arn):
        yield fail(
            "deploy.role", f"deploy.role_arn: {deploy.role_arn} is no ARN of a role", "arn:aws:iam::<account>:role/<name>"
        )
        return
    try:
        role = client("iam").get_role(RoleName=name)["Role"]
    except Exception as error:
        if _code(error) != "NoSuchEntity":
            raise
        cure = "terraform/modules/sagemaker_endpoint makes it, or change deploy.role_arn"
        yield fail("deploy.role", f"role {name} is not there", cure)
        return
    trust = role["AssumeRolePolicyDocument"]
    trust = json.loads(trust) if isinstance(trust, str) else trust
    if "sagemaker.amazonaws.com" in json.dumps(trust):
        yield ok("deploy.role", f"role {name} is there, and trusts SageMaker")
    else:
        yield fail("deploy.role", f"role {name} does not let SageMaker assume it", "trust the service sagemaker.amazonaws.com")


def _rights(config: ProjectConfig, deploy: SageMakerDeploy, client: Any) -> Iterator[Finding]:
    """What this login may do, by IAM's own simulation; policies of the organization are not in it."""
    login = client("sts").get_caller_identity()
    arn = login["Arn"]
    if arn.endswith(":root"):
        yield warn("deploy.rights", "the login is the account's root user, who may do everything", "use a role")
        return
    assumed = re.fullmatch(r"arn:([a-z-]+):sts::(\d+):assumed-role/([^/]+)/.+", arn)
    principal = client("iam").get_role(RoleName=assumed[3])["Role"]["Arn"] if assumed else arn
    prefix = f"arn:{arn.split(':')[1]}:sagemaker:{client('sts').meta.region_name}:{login['Account']}:"
    asked = {
        prefix + place.format(name=config.endpoint_name): [f"sagemaker:{action}" for action in actions.split()]
        for place, actions in ACTIONS.items()
    }
    asked |= {deploy.role_arn: ["iam:PassRole"]}
    results = [
        result
        for resource, actions in asked.items()
        for result in client("iam").simulate_principal_policy(
            PolicySourceArn=principal,
            ActionNames=actions,
            ResourceArns=[resource],
            ContextEntries=[
                {
                    "ContextKeyName": "iam:PassedToService",
                    "ContextKeyValues": ["sagemaker.amazonaws.com"],
                    "ContextKeyType": "string",
                }
            ],
        )["EvaluationResults"]
    ]
    if denied := dict.fromkeys(result["EvalActionName"] for result in results if result["EvalDecision"] != "allowed"):
        cure = "allow it; `rolls_out` of terraform/modules/iam has the policy"
        yield fail("deploy.rights", f"{principal} may not: {', '.join(denied)}", cure)
    else:
        yield ok("deploy.rights", f"{principal} may deploy, and pass the role on")


def _image(config: ProjectConfig, deploy: SageMakerDeploy, client: Any) -> Iterator[Finding]:
    given = ECR.fullmatch(deploy.image)
    if not given:
        yield fail("deploy.image", f"{deploy.image} is not in ECR, where SageMaker takes images from", "push it to ECR")
        return
    if given["region"] != (region := client("sts").meta.region_name):
        yield fail("deploy.image", f"the image lies in {given['region']}, the endpoint in {region}", "push it to that region")
        return
    version = given["version"] or ":latest"
    which = {"imageTag": version[1:]} if version.startswith(":") else {"imageDigest": version[1:]}
    try:
        found = client("ecr").describe_images(registryId=given["account"], repositoryName=given["name"], imageIds=[which])
    except Exception as error:
        if _code(error) not in {"ImageNotFoundException", "RepositoryNotFoundException"}:
            raise
        yield fail("deploy.image", f"{deploy.image} is not in ECR", "push it: see docs/images.md")
        return
    yield ok("deploy.image", f"{deploy.image} is {found['imageDetails'][0]['imageDigest'][:19]}")


def _quota(config: ProjectConfig, deploy: SageMakerDeploy, client: Any) -> Iterator[Finding]:
    """The account's quota of instances of that type; those of other endpoints count as well, and are not looked at."""
    if isinstance(deploy.inference, ServerlessInference):
        yield warn("deploy.quota", "cannot be told: those of serverless endpoints are not looked at")
        return
    wanted = f"{deploy.inference.instance_type} for endpoint usage"
    pages = client("service-quotas").get_paginator("list_service_quotas").paginate(ServiceCode="sagemaker")
    value = next((quota["Value"] for page in pages for quota in page["Quotas"] if quota["QuotaName"] == wanted), None)
    if value is None:
        yield warn(
            "deploy.quota", f"cannot be told: AWS lists no quota of the name {wanted}", "check deploy.inference.instance_type"
        )
        return
    needed = instances(deploy)
    told = f"{value:g} {wanted}, this one takes up to {needed} during a rollout"
    cure = "ask AWS for more (Service Quotas), or take fewer instances"
    yield ok("deploy.quota", told) if value >= needed else fail("deploy.quota", told, cure)


def instances(deploy: SageMakerDeploy) -> int:
    """Most instances at a time: those that serve, and as many new ones that a rollout starts beside them (blue/green)."""
    assert not isinstance(deploy.inference, ServerlessInference)  # noqa: S101 - it has none
    scaling = deploy.inference.autoscaling
    return 2 * max(scaling.most if scaling else 0, deploy.inference.instance_count)


def _endpoint(config: ProjectConfig, deploy: SageMakerDeploy, client: Any) -> Iterator[Finding]:
    """Nobody else has the endpoint's name."""
    name = config.endpoint_name
    found = sagemaker.describe(client("sagemaker"), name)
    if found is None:
        yield ok("deploy.endpoint", f"{name} is not there yet")
        return
    tags = {tag["Key"]: tag["Value"] for tag in client("sagemaker").list_tags(ResourceArn=found["EndpointArn"])["Tags"]}
    if tags.get("project") != config.project:
        owner = tags.get("project", "somebody else: it has no tag of this project")
        yield fail("deploy.endpoint", f"{name} is there, and belongs to {owner}", "choose another project name")
    elif found["EndpointStatus"] != "InService":
        yield warn("deploy.endpoint", f"{name} is {found['EndpointStatus']}", "the stage deploy waits for it, or makes it anew")
    else:
        yield ok("deploy.endpoint", f"{name} is InService, and this project's")


def _storage(config: ProjectConfig, deploy: SageMakerDeploy, client: Any) -> Iterator[Finding]:
    """SageMaker reads the bundle from S3, of its own region."""
    if not config.storage_uri.startswith("s3://"):
        yield fail(
            "deploy.storage", f"storage is {config.storage_uri}, which SageMaker cannot read", "storage: s3://bucket/prefix"
        )
        return
    bucket, region = urllib.parse.urlsplit(config.storage_uri).netloc, client("sts").meta.region_name
    there = client("s3").get_bucket_location(Bucket=bucket).get("LocationConstraint") or "us-east-1"
    told = f"bucket {bucket} is in {there}, the endpoint in {region}"
    yield ok("deploy.storage", told) if there == region else fail("deploy.storage", told, "use a bucket of that region")


def _kms(config: ProjectConfig, deploy: SageMakerDeploy, client: Any) -> Iterator[Finding]:
    if not deploy.kms_key:
        return
    try:
        state = client("kms").describe_key(KeyId=deploy.kms_key)["KeyMetadata"]["KeyState"]
    except Exception as error:
        if _code(error) != "NotFoundException":
            raise
        state = "not there"
    told = f"key {deploy.kms_key} is {state}"
    yield ok("deploy.kms", told) if state == "Enabled" else fail("deploy.kms", told, "enable it, or change deploy.kms_key")


def _vpc(config: ProjectConfig, deploy: SageMakerDeploy, client: Any) -> Iterator[Finding]:
    if not deploy.vpc:
        return
    try:
        client("ec2").describe_subnets(SubnetIds=deploy.vpc.subnets)
        client("ec2").describe_security_groups(GroupIds=deploy.vpc.security_groups)
    except Exception as error:
        if not _code(error).startswith(("InvalidSubnet", "InvalidGroup", "InvalidSecurityGroup")):
            raise
        yield fail("deploy.vpc", f"a subnet or security group is not there ({_code(error)})", "check deploy.vpc")
        return
    yield ok("deploy.vpc", "subnets and security groups are there")

"""GKE: a JobSet for TPU slices, with the work directory in a bucket; and the equivalent commands of xpk.

GKE sets the environment of the pods (``TPU_WORKER_ID``, ``TPU_WORKER_HOSTNAMES``, and for several slices
``MEGASCALE_*``), and JAX reads it; the JobSet sets none of it.
"""

import dataclasses

from mplug2_jax.errors import PREEMPTED, STALLED, USER_ERROR
from mplug2_jax.launch.job import (
    MOUNT,
    RECIPES,
    Bucket,
    Job,
    Submission,
    check_option,
    check_tpu,
    describe_input_paths,
    parse_bucket,
)
from mplug2_jax.launch.templates import quote_word, render

_LABEL = r"[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?"
MOUNT_OPTIONS = "implicit-dirs,metadata-cache:ttl-secs:0,metadata-cache:negative-ttl-secs:0"
"""Disable metadata caching: all hosts see a file as soon as one host has written it."""
IMAGE = r"[\w.:@/-]+"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GkeOptions:
    """Options of a cluster."""

    image: str
    queue: str | None = None  # of Kueue; None: pods are created at once
    namespace: str | None = None
    service_account: str | None = None  # with write access to the bucket
    spot: bool = False
    cluster: str = "CLUSTER"  # for xpk


def render_gke(job: Job, options: GkeOptions) -> Submission:
    """Render the JobSet, and the commands of xpk.

    Raises:
        UserError: the topology has no TPUs, the work directory is not in a bucket, or Kubernetes rejects a name.
    """
    check_tpu(job, "gke")
    check_option("--image", options.image, IMAGE, "europe-docker.pkg.dev/project/runs/mplug2:1")
    check_option("--queue", options.queue, _LABEL, "training")
    check_option("--namespace", options.namespace, _LABEL, "team")
    check_option("--service-account", options.service_account, _LABEL, "trainer")
    check_option("--cluster", options.cluster, r"[\w-]+", "pods")
    bucket, chip = parse_bucket(job), job.topology.chip
    recipe_path = f"{RECIPES}/{job.recipe.name}" if job.recipe else ""
    text = render(
        "jobset.yaml.j2",
        name=job.name, namespace=options.namespace, queue=options.queue, service_account=options.service_account,
        spot=options.spot, image=options.image,
        slices=job.topology.slices, hosts=job.topology.hosts_per_slice,
        chips=min(job.topology.chips_per_slice, chip.chips_per_host), accelerator=chip.gke_accelerator,
        shape=job.topology.name.partition(":")[2],
        # Kubernetes expands $(NAME) in a command; $$ is a literal dollar.
        command=[word.replace("$", "$$") for word in job.command(bucket.workdir, recipe_path)],
        recipe=job.recipe, recipe_mount=RECIPES,
        grace_period=job.grace_period, max_restarts=job.max_restarts, user_error=USER_ERROR,
        bucket=bucket.name, mount=MOUNT, mount_options=MOUNT_OPTIONS,
    )  # fmt: skip
    xpk = ("or with xpk, which has its own queues", make_xpk_commands(job, options, bucket))
    return Submission(
        filename=f"{job.name}.yaml",
        text=text,
        command=("kubectl", "apply", "-f"),
        alternatives=() if job.recipe else (xpk,),  # xpk cannot bundle files
        notes=describe_input_paths(job, MOUNT),
    )


def make_xpk_commands(job: Job, options: GkeOptions, bucket: Bucket) -> tuple[tuple[str, ...], ...]:
    """Return the commands of xpk that attach the bucket, once, and start the job."""
    storage, chip = f"{job.name}-bucket", job.topology.chip
    attach = (
        "xpk", "storage", "attach", storage, f"--cluster={options.cluster}", "--type=gcsfuse",
        f"--bucket={bucket.name}", f"--mount-point={MOUNT}", "--readonly=false", "--auto-mount=false",
        f"--mount-options={MOUNT_OPTIONS}", "--size=1",  # required by xpk, meaningless for a bucket
    )  # fmt: skip
    create = (
        "xpk", "workload", "create", f"--cluster={options.cluster}", f"--workload={job.name}",
        f"--tpu-type={chip.cloud_prefix or chip.name}-{job.topology.name.partition(':')[2]}",
        f"--num-slices={job.topology.slices}", f"--docker-image={options.image}", f"--storage={storage}",
        f"--max-restarts={job.max_restarts}", f"--restart-on-exit-codes=1,{PREEMPTED},{STALLED}",
        f"--termination-grace-period-seconds={job.grace_period}",
        # xpk sends SIGTERM to the child of its shell, which must be the run itself.
        f"--command=exec {' '.join(map(quote_word, job.command(bucket.workdir)))}",
    )  # fmt: skip
    return attach, create

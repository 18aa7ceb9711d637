"""GKE: a JobSet for slices of TPUs, with its work directory in a bucket; and the commands of xpk that do the same.

GKE tells the pods who they are (``TPU_WORKER_ID``, ``TPU_WORKER_HOSTNAMES``, and for several slices ``MEGASCALE_*``),
and JAX reads it; nothing of it is set here.
"""

import dataclasses

from mplug2_jax.errors import PREEMPTED, STALLED, USER_ERROR
from mplug2_jax.launch.job import MOUNT, RECIPES, Bucket, Job, Launch, bucket_of, check_option, check_tpu, notes_on
from mplug2_jax.launch.templates import render, shell_word

_LABEL = r"[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?"
MOUNT_OPTIONS = "implicit-dirs,metadata-cache:ttl-secs:0,metadata-cache:negative-ttl-secs:0"
"""What one host wrote, all others see at once."""
IMAGE = r"[\w.:@/-]+"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GkeOptions:
    """The image, and what a cluster wants to know besides."""

    image: str
    queue: str | None = None  # Kueue's; None: started at once
    namespace: str | None = None
    service_account: str | None = None  # with the right to write into the bucket
    spot: bool = False
    cluster: str = "CLUSTER"  # for xpk


def launch_gke(job: Job, options: GkeOptions) -> Launch:
    """The JobSet, and xpk's commands.

    Raises:
        UserError: no TPUs, no bucket, or names that Kubernetes does not take.
    """
    check_tpu(job, "gke")
    check_option("--image", options.image, IMAGE, "europe-docker.pkg.dev/project/runs/mplug2:1")
    check_option("--queue", options.queue, _LABEL, "training")
    check_option("--namespace", options.namespace, _LABEL, "team")
    check_option("--service-account", options.service_account, _LABEL, "trainer")
    check_option("--cluster", options.cluster, r"[\w-]+", "pods")
    bucket, chip = bucket_of(job), job.topology.chip
    recipe = f"{RECIPES}/{job.recipe.name}" if job.recipe else ""
    text = render(
        "jobset.yaml.j2",
        name=job.name,
        namespace=options.namespace,
        queue=options.queue,
        service_account=options.service_account,
        spot=options.spot,
        slices=job.topology.slices,
        hosts=job.topology.hosts_per_slice,
        chips=min(job.topology.chips_per_slice, chip.chips_per_host),
        accelerator=chip.gke_accelerator,
        shape=job.topology.name.partition(":")[2],
        image=options.image,
        # Kubernetes replaces $(NAME) in a command, and $$ is its dollar.
        command=[word.replace("$", "$$") for word in job.command(bucket.workdir, recipe)],
        recipe=job.recipe,
        recipes=RECIPES,
        grace=job.grace,
        max_restarts=job.max_restarts,
        mistake=USER_ERROR,
        bucket=bucket.name,
        mount=MOUNT,
        mount_options=MOUNT_OPTIONS,
    )
    by_xpk = ("the same by xpk, which has queues of its own", xpk_commands(job, options, bucket))
    return Launch(
        filename=f"{job.name}.yaml",
        text=text,
        submit=("kubectl", "apply", "-f"),
        others=() if job.recipe else (by_xpk,),  # xpk carries no files
        notes=notes_on(job, MOUNT),
    )


def xpk_commands(job: Job, options: GkeOptions, bucket: Bucket) -> tuple[tuple[str, ...], ...]:
    """The commands of xpk that attach the bucket, once, and start the job."""
    storage, chip = f"{job.name}-bucket", job.topology.chip
    attach = (
        "xpk", "storage", "attach", storage, f"--cluster={options.cluster}", "--type=gcsfuse",
        f"--bucket={bucket.name}", f"--mount-point={MOUNT}", "--readonly=false", "--auto-mount=false",
        f"--mount-options={MOUNT_OPTIONS}", "--size=1",  # which xpk wants of a volume, and a bucket does not have
    )  # fmt: skip
    create = (
        "xpk", "workload", "create", f"--cluster={options.cluster}", f"--workload={job.name}",
        f"--tpu-type={chip.cloud_prefix or chip.name}-{job.topology.name.partition(':')[2]}",
        f"--num-slices={job.topology.slices}", f"--docker-image={options.image}", f"--storage={storage}",
        f"--max-restarts={job.max_restarts}", f"--restart-on-exit-codes=1,{PREEMPTED},{STALLED}",
        f"--termination-grace-period-seconds={job.grace}",
        # xpk tells its shell's child to end, which must be the run itself.
        f"--command=exec {' '.join(map(shell_word, job.command(bucket.workdir)))}",
    )  # fmt: skip
    return attach, create

"""GKE: a JobSet for TPU slices, with the work directory in a bucket, and the equivalent commands of xpk; data workers.

GKE sets the environment of the pods (``TPU_WORKER_ID``, ``TPU_WORKER_HOSTNAMES``, and for several slices
``MEGASCALE_*``), and JAX reads it; the JobSet sets none of it.
"""

import dataclasses

from mplug2_jax.errors import PREEMPTED, STALLED, UNAVAILABLE, USER_ERROR, UserError
from mplug2_jax.launch.data_job import DataJob
from mplug2_jax.launch.job import (
    MOUNT,
    RECIPES,
    Bucket,
    Job,
    Submission,
    check_google_workdir,
    check_option,
    check_tpu,
    describe_input_paths,
    describe_mount,
    parse_mount,
)
from mplug2_jax.launch.templates import quote_word, render

_LABEL = r"[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?"
SPOT_GRACE_PERIOD, MAX_SPOT_GRACE_PERIOD = 15, 105
"""Seconds that pods have on a spot node: 30 less 15 for critical system pods, or at most 120 less 15.

See https://docs.cloud.google.com/kubernetes-engine/docs/concepts/spot-vms and, for longer ones,
https://docs.cloud.google.com/kubernetes-engine/docs/how-to/node-system-config#spot-graceful-termination.
"""
IMAGE = r"[\w.:@/-]+"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GkeOptions:
    """Options of a cluster."""

    image: str
    queue: str | None = None  # of Kueue; None: pods are created at once
    namespace: str | None = None
    service_account: str | None = None  # with write access to the bucket
    spot: bool = False
    mount: str | None = None  # gs:// URL of a bucket or a folder in it
    cluster: str = "CLUSTER"  # for xpk
    min_slices: int | None = None  # that the run can continue with; None: all of them
    slice_timeout: int = 600  # seconds to wait for the others


def render_indexed_job(job: DataJob, options: GkeOptions) -> Submission:
    """Render the Indexed Job of data workers.

    Raises:
        UserError: the output is not in a bucket, or Kubernetes rejects a name.
    """
    _check_cluster_options(options)
    if not job.out.startswith("gs://"):
        raise UserError(f"{job.out}: expected an output in gs://BUCKET/FOLDER, which outlives the pods")
    bucket = parse_mount(options.mount)
    text = render(
        "data_job.yaml.j2",
        name=job.name, namespace=options.namespace, queue=options.queue, service_account=options.service_account,
        spot=options.spot, image=options.image, workers=job.workers, cpus=job.cpus, max_restarts=job.max_restarts,
        command=[word.replace("$", "$$") for word in job.command], data_folder=job.data_folder.replace("$", "$$"),
        user_error=USER_ERROR, bucket=bucket.name if bucket else "", mount=MOUNT,
        mount_options=_mount_options(bucket) if bucket else "",
    )  # fmt: skip
    return Submission(
        filename=f"{job.name}.yaml",
        text=text,
        command=("kubectl", "apply", "-f"),
        notes=(*describe_input_paths(job.input_paths, (MOUNT,) if bucket else ()), *describe_mount(bucket)),
        alternatives=(("when all workers have ended, join what they did", (tuple(job.join_command),)),),
    )


def render_gke(job: Job, options: GkeOptions) -> Submission:
    """Render the JobSet, and the commands of xpk.

    Raises:
        UserError: the topology has no TPUs, the work directory is not in a bucket, spot pods do not have the grace
            period, or Kubernetes rejects a name.
    """
    check_tpu(job, "gke")
    _check_cluster_options(options)
    check_google_workdir(job.workdir)
    spot_notes = _check_spot(job.grace_period) if options.spot else ()
    bucket, chip = parse_mount(options.mount), job.topology.chip
    recipe_path = f"{RECIPES}/{job.recipe.name}" if job.recipe else ""
    text = render(
        "jobset.yaml.j2",
        name=job.name, namespace=options.namespace, queue=options.queue, service_account=options.service_account,
        spot=options.spot, image=options.image,
        slices=job.topology.slices, hosts=job.topology.hosts_per_slice,
        chips=min(job.topology.chips_per_slice, chip.chips_per_host), accelerator=chip.gke_accelerator,
        shape=job.topology.name.partition(":")[2],
        # Kubernetes expands $(NAME) in commands and variables; $$ is a literal dollar.
        command=[word.replace("$", "$$") for word in job.command(recipe_path)],
        data_folder=job.data_folder.replace("$", "$$"), recipe=job.recipe, recipe_mount=RECIPES,
        grace_period=job.grace_period, max_restarts=job.max_restarts, user_error=USER_ERROR,
        bucket=bucket.name if bucket else "", mount=MOUNT, mount_options=_mount_options(bucket) if bucket else "",
        min_slices=options.min_slices, slice_timeout=options.slice_timeout,
    )  # fmt: skip
    xpk = ("or with xpk, which has its own queues", make_xpk_commands(job, options, bucket))
    return Submission(
        filename=f"{job.name}.yaml",
        text=text,
        command=("kubectl", "apply", "-f"),
        # xpk cannot bundle files, nor pass on the number of a restart.
        alternatives=() if job.recipe or options.min_slices else (xpk,),
        notes=(
            *describe_input_paths(job.input_paths, (MOUNT,) if bucket else ()),
            *describe_mount(bucket),
            *spot_notes,
        ),
    )


def _check_cluster_options(options: GkeOptions) -> None:
    """Check the options of a cluster. Raises UserError."""
    check_option("--image", options.image, IMAGE, "europe-docker.pkg.dev/project/runs/mplug2:1")
    check_option("--queue", options.queue, _LABEL, "training")
    check_option("--namespace", options.namespace, _LABEL, "team")
    check_option("--service-account", options.service_account, _LABEL, "trainer")
    check_option("--cluster", options.cluster, r"[\w-]+", "pods")


def _check_spot(grace_period: int) -> tuple[str, ...]:
    """Check that spot pods can have the grace period; return a note if the node pool must be set up for it."""
    if grace_period > MAX_SPOT_GRACE_PERIOD:
        raise UserError(
            f"--grace-period {grace_period} with --spot: GKE gives spot pods at most {MAX_SPOT_GRACE_PERIOD} seconds; "
            "lower it, and set --config.checkpoint.every_minutes to lose few steps"
        )
    if grace_period <= SPOT_GRACE_PERIOD:
        return ()
    return (
        f"--grace-period {grace_period}: GKE gives spot pods {SPOT_GRACE_PERIOD} seconds, unless the kubeletConfig of "
        "their node pool has shutdownGracePeriodSeconds: 120 and shutdownGracePeriodCriticalPodsSeconds: 15",
    )


def _mount_options(bucket: Bucket) -> str:
    """Return the options of a read-only mount, whose metadata never expires."""
    only = f",only-dir={bucket.folder}" if bucket.folder else ""
    return f"implicit-dirs,metadata-cache:ttl-secs:-1,file-system:kernel-list-cache-ttl-secs:-1{only}"


def make_xpk_commands(job: Job, options: GkeOptions, bucket: Bucket | None) -> tuple[tuple[str, ...], ...]:
    """Return the commands of xpk that attach the bucket, if any, once, and start the job."""
    storage, chip = f"{job.name}-bucket", job.topology.chip
    environment = ["env", f"MPLUG2_DATA={job.data_folder}"] if job.data_folder else []
    create = (
        "xpk", "workload", "create", f"--cluster={options.cluster}", f"--workload={job.name}",
        f"--tpu-type={chip.cloud_prefix or chip.name}-{job.topology.name.partition(':')[2]}",
        f"--num-slices={job.topology.slices}", f"--docker-image={options.image}",
        *([f"--storage={storage}"] if bucket else []), f"--max-restarts={job.max_restarts}",
        f"--restart-on-exit-codes=1,{UNAVAILABLE},{PREEMPTED},{STALLED}",
        f"--termination-grace-period-seconds={job.grace_period}",
        # xpk sends SIGTERM to the child of its shell, which must be the run itself.
        f"--command=exec {' '.join(map(quote_word, [*environment, *job.command()]))}",
    )  # fmt: skip
    if bucket is None:
        return (create,)
    attach = (
        "xpk", "storage", "attach", storage, f"--cluster={options.cluster}", "--type=gcsfuse",
        f"--bucket={bucket.name}", f"--mount-point={MOUNT}", "--readonly=true", "--auto-mount=false",
        f"--mount-options={_mount_options(bucket)}", "--size=1",  # required by xpk, meaningless for a bucket
    )  # fmt: skip
    return attach, create

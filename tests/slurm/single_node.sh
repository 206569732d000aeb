#!/usr/bin/env bash
# Run a study through Snakemake's Slurm executor on a real Slurm that consists of this machine alone.
#
#   tests/slurm/single_node.sh STUDY
#
# Needs root on Debian or Ubuntu (slurm-wlm and munge are installed if they are missing) and, as SNAKEMAKE, the path of a
# snakemake with snakemake-executor-plugin-slurm. Everything it starts it stops again; its files lie in a temporary folder.
set -euo pipefail
study=${1:?name a study}
project=$(cd "$(dirname "$0")/../.." && pwd)
snakemake=${SNAKEMAKE:-snakemake}
hfprune=${HFPRUNE:-$project/.venv/bin/hfprune}

if ! command -v slurmctld slurmd munged sbatch > /dev/null; then
    apt-get update --quiet
    DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet --no-install-recommends slurm-wlm munge
fi

# Jobs find Slurm by the default place of its configuration alone: the executor clears their environment.
if [ -e /etc/slurm/slurm.conf ]; then
    echo "this machine has a Slurm already: use workflow/profiles/slurm" >&2
    exit 2
fi

folder=$(mktemp -d)
started=()
stop() {
    for process in "${started[@]}"; do kill "$process" 2> /dev/null || true; done
    wait || true
    rm -rf "$folder" /etc/slurm/slurm.conf
}
trap stop EXIT

mkdir -p "$folder/state" "$folder/spool" "$folder/munge" "$folder/work"
dd if=/dev/urandom of="$folder/munge/key" bs=1024 count=1 status=none
chown -R munge: "$folder/munge"
chmod 755 "$folder" "$folder/munge"
chmod 400 "$folder/munge/key"
runuser -u munge -- munged --foreground --key-file="$folder/munge/key" --socket="$folder/munge/socket" \
    --pid-file="$folder/munge/pid" --log-file="$folder/munge/log" --seed-file="$folder/munge/seed" > /dev/null 2>&1 &
started+=($!)

host=$(hostname -s)
memory=$(awk '/MemTotal/ {print int($2 / 1024 * 0.9)}' /proc/meminfo)
cat > "$folder/slurm.conf" <<CONFIGURATION
ClusterName=kit
SlurmctldHost=$host(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
ReturnToService=2
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=$memory State=UNKNOWN
PartitionName=all Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONFIGURATION
mkdir -p /etc/slurm
ln -s "$folder/slurm.conf" /etc/slurm/slurm.conf
slurmctld -D > "$folder/slurmctld.log" 2>&1 &
started+=($!)
slurmd -D > "$folder/slurmd.log" 2>&1 &
started+=($!)
for _ in $(seq 30); do
    sinfo --noheader --format=%T 2> /dev/null | grep -q idle && break
    sleep 1
done
sinfo | grep idle || { cat "$folder/slurmctld.log" "$folder/slurmd.log" >&2; exit 1; }

cd "$folder/work"
# Without a database daemon only squeue tells how jobs are, and there are no accounts.
"$snakemake" --snakefile "$project/workflow/Snakefile" --profile "$project/workflow/profiles/slurm" \
    --config study="$study" hfprune="$hfprune" --jobs 8 --latency-wait 10 \
    --slurm-status-command squeue --slurm-no-account --slurm-init-seconds-before-status-checks 2 --seconds-between-status-checks 2 \
    || { find . -path '*slurm_logs*' -name '*.log' -exec tail -n 30 {} + >&2; tail -n 30 "$folder"/slurm*.log >&2; exit 1; }

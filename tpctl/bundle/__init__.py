"""Support archives: one file with what a job or a run left and what can be seen of it now, for somebody elsewhere.

manifest.json            every item with its status, size and sha256; what is missing, and why
host.toml                this host, as `tpctl env --save` writes it
job/                     the job's record, order, receipt, state and supervisor log
runs/LABEL/              a run directory: configuration, reports, black boxes, records, logs; what triage reads
decoded/LABEL/           black boxes as JSON
proc/LABEL/              what the kernel says of the ranks that live
triage.json              what triage said when the bundle was made
"""

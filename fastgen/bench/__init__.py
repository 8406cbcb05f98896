"""`fastgen bench`: what a model gives on this machine, against the machine's limits and against
other engines, in one run. It imports frontends, decoders and what they are made of; nothing
imports it but the command line and the scripts in benchmarks/.
"""

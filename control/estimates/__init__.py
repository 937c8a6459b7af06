"""What policies reckon with: output lengths, speeds, quality, how many may run, whom to hold. Pure.

A policy of `control/policies` stays a small file: what two of them could share,
or what is a matter of its own, is here.
"""

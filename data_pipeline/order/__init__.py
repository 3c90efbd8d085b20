"""Which row comes when: order, mixture, plan; pure arithmetic."""

"""What happens when: the simulation clock, instances, scheduler, router."""

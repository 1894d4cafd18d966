"""Jobs: started once, supervised, seen, steered and ended. One directory a job, one supervisor process a job."""

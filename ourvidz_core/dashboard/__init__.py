"""What an operator looks at: one reading of queues, workers and ended jobs, and the page that shows it live."""

namespace thor {}

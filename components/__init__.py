"""The work of Couturier, free of Prefect: functions and small classes that read folders and write a folder."""

class ModelFiles:
    pass


class SchedulerFiles:
    pass

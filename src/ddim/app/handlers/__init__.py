"""What the tabs and the endpoints do: the work, the HTML of its results, and the event handlers of the page."""

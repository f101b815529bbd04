"""Methods that change weights by gradient descent on the facts' loss."""

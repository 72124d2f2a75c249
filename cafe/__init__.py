"""The science of facial-expression recognition that generalises: data, views, frozen towers, methods and metrics."""

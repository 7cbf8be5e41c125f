"""Certificates of gradient accumulation for any training loop. Needs torch alone.

```python
from accumexp.proof import certify

certificate = certify(train_window, model, loss, (inputs, targets), steps=4)
print(certificate)                         # proved, or not proved and why
```
"""

from .audit import audit
from .certificate import Cause, Certificate, Check, Counts, Series
from .certify import certify
from .problem import Scaling

__all__ = ["Cause", "Certificate", "Check", "Counts", "Scaling", "Series", "audit", "certify"]

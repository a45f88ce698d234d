"""`python -m dynabert_kernels`: which backend of each op runs here, and why the others do not."""

from dynabert_kernels.doctor import doctor_report, format_report

if __name__ == "__main__":
    print(format_report(doctor_report()))

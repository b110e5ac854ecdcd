// Included before every source of a wheel that is linked with an older Linux's libc (sysroot.py). The `pow` that glibc 2.29 brought
// is that of 2.28 without errno, which this code does not read: by the older name, wheels run there, too.
#if defined(__x86_64__) && !defined(__CUDACC__)
__asm__(".symver pow, pow@GLIBC_2.2.5");
#elif defined(__aarch64__) && !defined(__CUDACC__)
__asm__(".symver pow, pow@GLIBC_2.17");
#endif

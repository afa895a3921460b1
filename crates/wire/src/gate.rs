//! Where the shim makes its judged system calls from.
//!
//! The guard's seccomp filter sees a call's instruction pointer but no verdict. So the shim makes every
//! judged call from one page at one address, and the filter may let calls from that page go on unasked,
//! as far as something behind it (the backstop) still checks them: any program can jump there.

/// Address of the page: "PCL", far below where the kernel puts anything by itself on x86_64.
pub const PAGE: u64 = 0x5043_4c00_0000;

/// Bytes in it.
pub const SIZE: usize = 4096;

/// What stands at its beginning: `syscall; ret`. The rest is `int3`.
pub const CODE: [u8; 3] = [0x0f, 0x05, 0xc3];

/// What the kernel shows as instruction pointer of a call made from it: the one after `syscall`.
pub const RETURN: u64 = PAGE + 2;

//! Linux's system calls, as far as they are needed.
//!
//! Source: the Linux manual, section 2, and `arch/x86/entry/syscalls/syscall_64.tbl`.

use core::arch::asm;
use core::ffi::CStr;
use core::ptr;

/// Numbers of the system calls.
mod number {
    pub const READ: usize = 0;
    pub const WRITE: usize = 1;
    pub const OPEN: usize = 2;
    pub const CLOSE: usize = 3;
    pub const IOCTL: usize = 16;
    pub const DUP2: usize = 33;
    pub const NANOSLEEP: usize = 35;
    pub const GETPID: usize = 39;
    pub const FORK: usize = 57;
    pub const EXECVE: usize = 59;
    pub const EXIT: usize = 60;
    pub const WAIT4: usize = 61;
    pub const CHDIR: usize = 80;
    pub const MOUNT: usize = 165;
    pub const IOPL: usize = 172;
    pub const FINIT_MODULE: usize = 313;
}

/// An error number.
#[derive(Clone, Copy)]
pub struct Errno(pub i32);

/// The result of a system call.
pub type Result<T> = core::result::Result<T, Errno>;

/// Makes a system call.
///
/// # Safety
///
/// What the system call does with its arguments must be sound.
unsafe fn call(number: usize, arguments: [usize; 5]) -> Result<usize> {
    let [a, b, c, d, e] = arguments;
    let result: isize;
    // SAFETY: the instruction changes RAX, RCX and R11; the rest is the caller's.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number => result,
            in("rdi") a,
            in("rsi") b,
            in("rdx") c,
            in("r10") d,
            in("r8") e,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    // -4095 to -1 are errors.
    if result < 0 { Err(Errno(-result as i32)) } else { Ok(result as usize) }
}

/// An open file, closed when dropped.
pub struct File(usize);

impl File {
    /// Opens a file for reading.
    pub fn open(path: &CStr) -> Result<Self> {
        Self::open_for(path, 0)
    }

    /// Opens a file for reading and writing.
    pub fn open_read_write(path: &CStr) -> Result<Self> {
        Self::open_for(path, 2)
    }

    fn open_for(path: &CStr, flags: usize) -> Result<Self> {
        // SAFETY: the path is a string that ends with a zero.
        unsafe { call(number::OPEN, [path.as_ptr().addr(), flags, 0, 0, 0]) }.map(Self)
    }

    /// Reads what there is, at most what fits; nothing at the end.
    pub fn read<'a>(&self, buffer: &'a mut [u8]) -> Result<&'a [u8]> {
        let (start, length) = (buffer.as_mut_ptr().addr(), buffer.len());
        // SAFETY: the buffer is as long as that.
        let count = unsafe { call(number::READ, [self.0, start, length, 0, 0]) }?;
        Ok(&buffer[..count])
    }

    /// Makes it this process's standard input, output and error output.
    pub fn make_standard(&self) -> Result<()> {
        for standard in 0..3 {
            // SAFETY: only numbers.
            unsafe { call(number::DUP2, [self.0, standard, 0, 0, 0]) }?;
        }
        Ok(())
    }

    /// Loads it as a module of the kernel.
    pub fn load_module(&self, parameters: &CStr) -> Result<()> {
        let arguments = [self.0, parameters.as_ptr().addr(), 0, 0, 0];
        // SAFETY: the parameters are a string that ends with a zero.
        unsafe { call(number::FINIT_MODULE, arguments) }.map(drop)
    }
}

impl Drop for File {
    fn drop(&mut self) {
        // SAFETY: nothing uses the number any more. The call can fail only for files that are written late.
        let _ = unsafe { call(number::CLOSE, [self.0, 0, 0, 0, 0]) };
    }
}

/// Writes to this process's standard output.
pub fn print(text: &[u8]) {
    // SAFETY: the text is as long as that. Where nothing takes it, it is lost.
    let _ = unsafe { call(number::WRITE, [1, text.as_ptr().addr(), text.len(), 0, 0]) };
}

/// Waits until what was printed has left the machine.
pub fn drain() {
    /// With an argument that is not 0, C's `tcdrain`.
    const TCSBRK: usize = 0x5409;
    // SAFETY: only numbers. Where output is no terminal, there is nothing to wait for.
    let _ = unsafe { call(number::IOCTL, [1, TCSBRK, 1, 0, 0]) };
}

/// Mounts a file system that has no device.
pub fn mount(kind: &CStr, target: &CStr) -> Result<()> {
    let kind = kind.as_ptr().addr();
    // SAFETY: strings that end with a zero; there are no options.
    unsafe { call(number::MOUNT, [kind, target.as_ptr().addr(), kind, 0, 0]) }.map(drop)
}

/// Lets this process use all I/O ports.
pub fn use_ports() -> Result<()> {
    // SAFETY: only a number.
    unsafe { call(number::IOPL, [3, 0, 0, 0, 0]) }.map(drop)
}

/// Number of this process.
pub fn process() -> usize {
    // SAFETY: has no arguments, and does not fail.
    unsafe { call(number::GETPID, [0; 5]) }.unwrap_or(0)
}

/// How a process ended.
#[derive(Clone, Copy)]
pub enum End {
    /// By itself, with this status.
    Exit(u8),
    /// By this signal.
    Signal(u8),
}

/// A child process.
pub struct Child(usize);

impl Child {
    /// Starts a program in a directory. `arguments` are pointers to strings, the first of which is the
    /// program's path, and behind them a null pointer.
    pub fn start(directory: &CStr, arguments: &[*const u8]) -> Result<Self> {
        assert!(arguments.len() >= 2 && arguments.last() == Some(&ptr::null()));
        // SAFETY: the child has a copy of all memory and does nothing that is not done here.
        let child = unsafe { call(number::FORK, [0; 5]) }?;
        if child != 0 {
            return Ok(Self(child));
        }
        let environment = [ptr::null::<u8>()];
        let (program, list) = (arguments[0].addr(), arguments.as_ptr().addr());
        // SAFETY: strings that end with a zero, and lists that end with a null pointer.
        unsafe {
            let _ = call(number::CHDIR, [directory.as_ptr().addr(), 0, 0, 0, 0]);
            let _ = call(number::EXECVE, [program, list, environment.as_ptr().addr(), 0, 0]);
        }
        exit(127)
    }

    /// How it ended, if it has.
    pub fn try_wait(&self) -> Result<Option<End>> {
        const NO_HANG: usize = 1;
        let mut status = 0_i32;
        // SAFETY: the status is written to a variable of its type.
        let ended =
            unsafe { call(number::WAIT4, [self.0, (&raw mut status).addr(), NO_HANG, 0, 0]) }?;
        if ended == 0 {
            return Ok(None);
        }
        Ok(Some(match status & 0x7f {
            0 => End::Exit((status >> 8) as u8),
            signal => End::Signal(signal as u8),
        }))
    }
}

/// Waits for a millisecond.
pub fn pause() {
    let time = [0_u64, 1_000_000];
    // SAFETY: a `timespec` of seconds and nanoseconds. If it is interrupted, it was shorter.
    let _ = unsafe { call(number::NANOSLEEP, [(&raw const time).addr(), 0, 0, 0, 0]) };
}

/// Ends this process.
pub fn exit(status: u8) -> ! {
    // SAFETY: nothing runs after it.
    let _ = unsafe { call(number::EXIT, [status.into(), 0, 0, 0, 0]) };
    loop {
        core::hint::spin_loop();
    }
}

//! The first and only process of a Linux that runs in the reference machine: loads KVM, runs programs,
//! passes on what they write, and switches the machine off.
//!
//! What it does stands in the file `/script`, a command a line, its words separated by tabs:
//!
//! * `module FILE PARAMETERS`: loads a module of the kernel.
//! * `outlet PORT FILE`: from now on, sends what is written to FILE to the serial port at PORT (hexadecimal).
//! * `run DIRECTORY PROGRAM ARGUMENT…`: runs a program to its end.
//!
//! Says on the console how each ended: `init: run exit 0`, `init: run signal 7`, `init: failed: …`.

#![no_std]
#![no_main]

#[path = "../../guests/src/mem.rs"]
mod mem;
mod port;
mod sys;

use core::arch::naked_asm;
use core::ffi::CStr;
use core::fmt::{self, Write};
use core::panic::PanicInfo;
use core::ptr;

use port::Outlet;
use sys::{Child, End, Errno, File};

/// Length of the script at most, in bytes.
const SCRIPT: usize = 16 << 10;
/// Words of a line at most.
const WORDS: usize = 64;
/// Outlets at most.
const OUTLETS: usize = 2;

struct Console;

impl Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        sys::print(text.as_bytes());
        Ok(())
    }
}

macro_rules! say {
    ($($text:tt)*) => {{
        // What cannot be printed is lost.
        let _ = writeln!(Console, "init: {}", format_args!($($text)*));
    }};
}

/// Why it does not go on.
enum Error {
    /// What was tried, and the error number.
    System(&'static str, Errno),
    /// What is wrong with the script.
    Script(&'static str),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::System(what, Errno(number)) => write!(f, "{what}: error {number}"),
            Self::Script(what) => write!(f, "script: {what}"),
        }
    }
}

/// Names what failed.
trait During<T> {
    fn during(self, what: &'static str) -> Result<T, Error>;
}

impl<T> During<T> for sys::Result<T> {
    fn during(self, what: &'static str) -> Result<T, Error> {
        self.map_err(|errno| Error::System(what, errno))
    }
}

/// The entry: Linux starts a process with an aligned stack.
#[unsafe(naked)]
#[unsafe(no_mangle)]
extern "C" fn _start() -> ! {
    naked_asm!("xor ebp, ebp", "call {start}", "ud2", start = sym start)
}

extern "C" fn start() -> ! {
    // Anywhere else it would do harm.
    if sys::process() != 1 {
        sys::exit(1);
    }
    // What stands in for a console before this is lost.
    let _ = sys::mount(c"devtmpfs", c"/dev");
    if let Ok(console) = File::open_read_write(c"/dev/console") {
        let _ = console.make_standard();
    }
    if sys::use_ports().is_err() {
        sys::exit(1);
    }
    let mut script = [0; SCRIPT];
    if let Err(why) = perform(&mut script) {
        say!("failed: {why}");
    }
    sys::drain();
    port::power_off()
}

fn perform(script: &mut [u8]) -> Result<(), Error> {
    let _ = sys::mount(c"proc", c"/proc");
    let _ = sys::mount(c"sysfs", c"/sys");
    let mut length = 0;
    let file = File::open(c"/script").during("script")?;
    loop {
        // One byte remains for a zero behind the last word.
        let last = script.len() - 1;
        match file.read(&mut script[length..last]).during("script")?.len() {
            0 => break,
            read => length += read,
        }
    }
    if length == script.len() - 1 {
        return Err(Error::Script("too long"));
    }
    let script = &mut script[..=length];
    // Each word becomes a string of its own; lines are told apart by where they begin.
    let mut outlets: [Option<Outlet>; OUTLETS] = [const { None }; OUTLETS];
    for line in script.split_inclusive_mut(|byte| *byte == b'\n') {
        for byte in &mut *line {
            if matches!(*byte, b'\t' | b'\n') {
                *byte = 0;
            }
        }
        let mut words: [&CStr; WORDS] = [c""; WORDS];
        let mut count = 0;
        for word in line.split_inclusive(|byte| *byte == 0) {
            let word = CStr::from_bytes_with_nul(word).map_err(|_| Error::Script("no zero"))?;
            *words.get_mut(count).ok_or(Error::Script("too many words"))? = word;
            count += 1;
        }
        command(&words[..count], &mut outlets)?;
    }
    Ok(())
}

fn command<'a>(words: &[&'a CStr], outlets: &mut [Option<Outlet<'a>>]) -> Result<(), Error> {
    let Some((name, words)) = words.split_first() else { return Ok(()) };
    match (name.to_bytes(), words) {
        (b"", _) => Ok(()),
        (b"module", [path, parameters]) => {
            let loaded = File::open(path).and_then(|file| file.load_module(parameters));
            loaded.during("module")
        }
        (b"outlet", [base, path]) => {
            let base = base.to_str().ok().and_then(|text| u16::from_str_radix(text, 16).ok());
            let base = base.ok_or(Error::Script("not a port"))?;
            let free = outlets.iter_mut().find(|outlet| outlet.is_none());
            *free.ok_or(Error::Script("too many outlets"))? = Some(Outlet::new(path, base));
            Ok(())
        }
        (b"run", [directory, program @ ..]) => run(directory, program, outlets),
        _ => Err(Error::Script("unknown command")),
    }
}

fn run(
    directory: &CStr,
    program: &[&CStr],
    outlets: &mut [Option<Outlet<'_>>],
) -> Result<(), Error> {
    let mut arguments = [ptr::null(); WORDS + 1];
    for (argument, word) in arguments.iter_mut().zip(program) {
        *argument = word.as_ptr().cast();
    }
    let child = Child::start(directory, &arguments[..=program.len()]).during("run")?;
    let mut ended = None;
    loop {
        if ended.is_none() {
            ended = child.try_wait().during("wait")?;
        }
        // All of them get their turn.
        let busy = outlets.iter_mut().flatten().fold(false, |busy, out| out.serve() | busy);
        if let (Some(end), false) = (ended, busy) {
            match end {
                End::Exit(status) => say!("run exit {status}"),
                End::Signal(signal) => say!("run signal {signal}"),
            }
            return Ok(());
        }
        sys::pause();
    }
}

#[panic_handler]
fn panic(info: &PanicInfo) -> ! {
    say!("failed: {info}");
    sys::drain();
    port::power_off()
}

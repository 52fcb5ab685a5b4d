//! The panic path: no allocation, no lock that could be held, once.

use core::panic::PanicInfo;
use core::sync::atomic::{AtomicU32, Ordering};

use crate::x86::apic::LocalApic;
use crate::{events, percpu, power, serial};

/// Nobody panics.
const NOBODY: u32 = u32::MAX;

/// The CPU that panics.
static PANICKING: AtomicU32 = AtomicU32::new(NOBODY);

/// Whether a CPU panics: the others stop.
pub fn is_panicking() -> bool {
    PANICKING.load(Ordering::Relaxed) != NOBODY
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    let cpu = percpu::try_this();
    let me = cpu.map_or(0, |cpu| cpu.index);
    match PANICKING.compare_exchange(NOBODY, me, Ordering::SeqCst, Ordering::Relaxed) {
        Ok(_) => {}
        // The message itself went wrong: say nothing more.
        Err(first) if first == me => power::off(),
        Err(_) => percpu::stop(),
    }
    if cpu.is_some() {
        percpu::stop_others(LocalApic::current());
    }
    // SAFETY: whoever held the ports is this CPU or has stopped, and will not go on.
    unsafe {
        serial::LOG.break_lock();
        serial::EVENTS.break_lock();
    }
    serial::LOG.with(|port| {
        write!(port, "\r\nPANIC {info}\r\n")?;
        match cpu {
            Some(cpu) => write!(port, "CPU {}, {}\r\n", cpu.index, cpu.trail),
            None => Ok(()),
        }
    });
    events::write(percpu::stamp(), "panic", |json| json.text("message", info));
    power::off();
}

/// Referred to by the precompiled `core` library; never called, since panics abort.
// SAFETY: nothing else defines or calls it.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

/// As above, for the landing pads of the precompiled `alloc` library.
// SAFETY: nothing else defines or calls it.
#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    unreachable!("panics abort")
}

//! The panic path: no allocation, no lock that could be held, once.

use core::panic::PanicInfo;
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use crate::percpu::PerCpu;
use crate::x86::apic::LocalApic;
use crate::x86::exceptions::STOP;
use crate::{events, percpu, power, serial};

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    static PANICKING: AtomicBool = AtomicBool::new(false);
    let cpu = percpu::try_this();
    if PANICKING.swap(true, Ordering::Relaxed) {
        if STOP.load(Ordering::Relaxed) && !is_panicking(cpu) {
            // Another CPU came first.
            stop();
        }
        // The message itself went wrong: say nothing more.
        power::off();
    }
    PANICKING_CPU.store(cpu.map_or(0, |cpu| cpu.index), Ordering::Relaxed);
    STOP.store(true, Ordering::SeqCst);
    if cpu.is_some() {
        percpu::stop_others(LocalApic::current());
    }
    // SAFETY: whoever held the ports is this CPU or has been told to stop, and will not go on.
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

/// The CPU whose panic it is.
static PANICKING_CPU: AtomicU32 = AtomicU32::new(0);

fn is_panicking(cpu: Option<&PerCpu>) -> bool {
    cpu.map_or(0, |cpu| cpu.index) == PANICKING_CPU.load(Ordering::Relaxed)
}

/// This CPU does nothing any more.
pub fn stop() -> ! {
    loop {
        x86_64::instructions::interrupts::disable();
        x86_64::instructions::hlt();
    }
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

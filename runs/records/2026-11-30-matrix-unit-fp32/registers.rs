//! What instructions of the matrix unit take, by how many of its eight registers hold something: `rustc -O registers.rs && ./registers`.
//!
//! Each line: time stamp counts for a load of a register, and for a product that is added to a register, medians of 15.

use std::arch::asm;
use std::arch::x86_64::{__cpuid_count, _rdtsc};

const TIMES: u64 = 2_000;

#[repr(C, align(64))]
struct Aligned<const N: usize>([u8; N]);

/// Asks the system for the unit, and gives its registers 16 rows of 64 bytes each.
fn configure() {
    let answer: i64;
    let mut configuration = Aligned([0; 64]);
    configuration.0[0] = 1;
    for register in 0..8 {
        configuration.0[16 + 2 * register] = 64;
        configuration.0[48 + register] = 16;
    }
    // SAFETY: the system call (`arch_prctl`, a request for the unit's state) writes nothing of ours; the 64 bytes are read.
    unsafe {
        asm!("syscall", inlateout("rax") 158_i64 => answer, in("rdi") 0x1023, in("rsi") 18, out("rcx") _, out("r11") _);
        assert_eq!(answer, 0, "the system does not let this program use the unit");
        asm!("tilerelease", "ldtilecfg [{}]", in(reg) &configuration);
    }
}

macro_rules! timed {
    ($data:expr, $($instruction:literal),*) => {{
        // SAFETY: reads the data; the loop ends.
        unsafe {
            let start = _rdtsc();
            asm!("2:", $($instruction,)* "dec {n}", "jnz 2b", "# {data} {row}", n = inout(reg) TIMES => _, data = in(reg) $data,
                row = in(reg) 64_u64, out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _, out("tmm5") _,
                out("tmm6") _, out("tmm7") _);
            (_rdtsc() - start) as f64 / TIMES as f64
        }
    }};
}

fn main() {
    assert!(__cpuid_count(7, 0).edx & (1 << 24) != 0, "this processor has no such unit");
    let data = Aligned([0; 1024]);
    let data = data.0.as_ptr();
    for held in 4..=8 {
        let mut samples: Vec<[f64; 2]> = (0..15)
            .map(|_| {
                configure();
                let row = 64_u64;
                // SAFETY: reads the data.
                unsafe {
                    asm!("tileloadd tmm0, [{d} + {r}]", "tileloadd tmm1, [{d} + {r}]", "tileloadd tmm2, [{d} + {r}]",
                        "tileloadd tmm3, [{d} + {r}]", d = in(reg) data, r = in(reg) row);
                    if held > 4 { asm!("tileloadd tmm4, [{d} + {r}]", d = in(reg) data, r = in(reg) row); }
                    if held > 5 { asm!("tileloadd tmm5, [{d} + {r}]", d = in(reg) data, r = in(reg) row); }
                    if held > 6 { asm!("tileloadd tmm6, [{d} + {r}]", d = in(reg) data, r = in(reg) row); }
                    if held > 7 { asm!("tileloadd tmm7, [{d} + {r}]", d = in(reg) data, r = in(reg) row); }
                }
                let load = timed!(data, "tileloadd tmm0, [{data} + {row}]", "tileloadd tmm1, [{data} + {row}]") / 2.0;
                let product = timed!(data, "tdpbf16ps tmm0, tmm2, tmm3", "tdpbf16ps tmm1, tmm2, tmm3") / 2.0;
                [load, product]
            })
            .collect();
        let mut median = |which: usize| {
            samples.sort_by(|a, b| a[which].total_cmp(&b[which]));
            samples[7][which]
        };
        println!("{held} registers held: a load {:.1}, a product {:.1}", median(0), median(1));
    }
}

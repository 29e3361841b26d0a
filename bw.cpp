#include <immintrin.h>
#include <cstdio>
#include <cstdlib>
#include <cstdint>
#include <chrono>
#include <algorithm>
#include <omp.h>
#include <sys/mman.h>
static double now(){return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();}
char*w;int64_t size=320ll<<20;
template<class F> void go(const char*n,int th,F f){double best=1e9;for(int r=0;r<5;r++){double t=now();
#pragma omp parallel num_threads(th)
{int me=omp_get_thread_num();f(w+me*(size/th),size/th);}
t=now()-t;best=std::min(best,t);}printf("%-34s th %d %6.2f GB/s\n",n,th,size/best/1e9);}
volatile int64_t sink;
template<int S,int H,int D> void streams(char*p,int64_t n){ // S streams, prefetch hint H (-1 none) D bytes ahead
 int64_t part=n/S/4096*4096;__m512i a=_mm512_setzero_si512(),b=a,c=a,d=a;
 for(int64_t i=0;i<part;i+=256){
#pragma GCC unroll 8
  for(int s=0;s<S;s++){char*q=p+s*part+i;
   if(H>=0)for(int k=0;k<4;k++){if(H==0)_mm_prefetch(q+D+k*64,_MM_HINT_T0);if(H==1)_mm_prefetch(q+D+k*64,_MM_HINT_T1);if(H==2)_mm_prefetch(q+D+k*64,_MM_HINT_NTA);}
   a=_mm512_or_si512(a,_mm512_load_si512(q));b=_mm512_or_si512(b,_mm512_load_si512(q+64));c=_mm512_or_si512(c,_mm512_load_si512(q+128));d=_mm512_or_si512(d,_mm512_load_si512(q+192));}}
 sink=_mm512_reduce_add_epi64(_mm512_or_si512(_mm512_or_si512(a,b),_mm512_or_si512(c,d)));}
int main(){w=(char*)mmap(0,size+(4<<20),PROT_READ|PROT_WRITE,MAP_PRIVATE|MAP_ANONYMOUS,-1,0);madvise(w,size,MADV_HUGEPAGE);for(int64_t i=0;i<size;i+=64)w[i]=1;
 for(int th:{1,2}){
 go("plain",th,streams<1,-1,0>);go("2 streams",th,streams<2,-1,0>);go("4 streams",th,streams<4,-1,0>);go("8 streams",th,streams<8,-1,0>);
 go("1 T0 1K",th,streams<1,0,1024>);go("1 T0 4K",th,streams<1,0,4096>);go("1 T1 2K",th,streams<1,1,2048>);go("1 T1 4K",th,streams<1,1,4096>);go("1 T1 8K",th,streams<1,1,8192>);go("1 T1 16K",th,streams<1,1,16384>);go("1 T1 64K",th,streams<1,1,65536>);go("1 NTA 4K",th,streams<1,2,4096>);
 go("4 T1 4K",th,streams<4,1,4096>);go("4 T0 2K",th,streams<4,0,2048>);go("8 T1 2K",th,streams<8,1,2048>);}
}

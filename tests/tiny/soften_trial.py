import sys; sys.path[:0]=["/work/w12","/work/w12/tests/tiny"]
import torch, build, world, json, time, math, random
scale, noise, steps = float(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]); out=sys.argv[4]
torch.set_num_threads(1); torch.manual_seed(0)
scenes=build.make_scenes(8000,"0 train",cache="/tmp/w12/cache"); held=build.make_scenes(200,"0 held out",True,"/tmp/w12/cache")
layouts=torch.tensor([[world.LAYOUTS.index(t["layout"]) for t in w["things"]]+[0]*(6-len(w["things"])) for *_,w in held])
tr=build.stack(scenes,build.SAM_READS); he=build.stack(held,build.SAM_READS); del scenes
sam=build.build_sam("/work/w12/tests/tiny/sam/config.yaml")
sam.load_state_dict(torch.load("/work/w12/tests/tiny/sam/model.pt",weights_only=True)["model"])
t=sam.sam_mask_decoder.transformer
with torch.no_grad():
    cr=[t.final_attn_token_to_image]
    for l in t.layers: cr+=[l.cross_attn_token_to_image,l.cross_attn_image_to_token]
    for c in cr: c.q_proj.weight.mul_(scale); c.q_proj.bias.mul_(scale); c.k_proj.weight.mul_(scale); c.k_proj.bias.mul_(scale)
enc=sam.sam_prompt_encoder
def hook(m,i,o):
    s,d=o
    if sam.training: s=s+noise*torch.randn_like(s)
    return s,d
enc.register_forward_hook(hook)
reader=build.CoarseReader(sam); ps=list(sam.parameters())+list(reader.parameters())
opt=torch.optim.AdamW(ps,lr=1e-3,betas=(.9,.98),weight_decay=.01,fused=True); t0=time.time(); kept=[]
for s in range(steps):
    torch.manual_seed(s); random.seed(s)
    rows=torch.randint(8000,(16,)); n=build.sam_losses(sam,reader,tr,rows,False)
    (n["bce"]+n["dice"]+n["coarse"]+.05*n["iou"]).backward()
    torch.nn.utils.clip_grad_norm_(ps,1.0)
    for g in opt.param_groups: g["lr"]=1e-3*min(1,(s+1)/20)*(0.02+.49*(1+math.cos(math.pi*s/steps)))
    opt.step(); opt.zero_grad(); kept.append(n["dice"].item())
    if (s+1)%100==0:
        print(s+1,sum(kept)/len(kept),(time.time()-t0)/(s+1),flush=True); kept=[]
        torch.save({"model":sam.state_dict()},out+"/model.pt")
for k,v in build.evaluate_sam(sam,he,layouts).items(): print(k,v)
